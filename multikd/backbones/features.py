"""What a timm model says: final features and rungs, alike for every family.

Two sorts of family are told apart by what timm's ``forward_intermediates`` offers, never by name:
*token* models (it returns prefix tokens: ViT, EVA, BEiT, NaFlex…) and *map* models (everything
else: CNNs, Swin, hierarchical and class-attention transformers).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from multikd.backbones.kernels import leave_quick, quick_depth
from multikd.backbones.measure import dry_run, reached_parameters
from multikd.types import Grid, TokenFeatures

Rungs = Literal["all", "last"] | Sequence[int]

# Tokens as they are, (B, N, D): as a map, timm's default, each rung would be copied twice a step.
_TOKENS: dict[str, Any] = {"return_prefix_tokens": True, "output_fmt": "NLC"}


@dataclass(frozen=True)
class RungPlan:
    """Which intermediate outputs of a model are rungs, and how they are read.

    Attributes:
        indices: ascending positions among the ``count`` blocks or stages.
        count: how many the model has.
        tokens: whether blocks give prefix tokens.
        class_summary: a rung's summary is its class token (else the mean of its patches).
        last_is_final: the last block's rung is the model's final features themselves.
    """

    indices: tuple[int, ...]
    count: int
    tokens: bool
    class_summary: bool
    last_is_final: bool


def final_features(model: nn.Module, images: Tensor) -> TokenFeatures:
    """Final features of a timm model for normalised ``images`` ``(B, 3, H, W)``.

    ``summary (B, D_s)`` is what timm's ``forward_head(pre_logits=True)`` gives, so a model without
    a classifier returns exactly it; ``patches (B, N, D_p)`` the final normed patch tokens or
    feature map; ``logits (B, K)`` where there is a classifier.
    """
    inside = quick_depth()
    try:
        final = model.forward_features(images)  # type: ignore[operator]
    finally:
        leave_quick(inside)
    return _read_final(model, final, _size(images))


def rung_features(
    model: nn.Module, images: Tensor, plan: RungPlan
) -> tuple[tuple[TokenFeatures, ...], TokenFeatures]:
    """Rungs of ``plan`` and the final features, from one forward pass.

    A token model's rung is the output of a block **before** the final norm (UNIC, arXiv
    2408.05088). A map model's is the output of a stage. Where ``plan.last_is_final`` the last rung
    is the final features, so that trainable layers behind the last block (a conv head, a norm,
    class attention) are trained too.
    """
    options = _TOKENS if plan.tokens else {}
    inside = quick_depth()
    try:
        final, outputs = model.forward_intermediates(  # type: ignore[operator]
            images, indices=list(plan.indices), **options
        )
    finally:
        leave_quick(inside)
    features = _read_final(model, final, _size(images))
    rungs = [_read_rung(output, plan, features.grid) for output in outputs]
    if plan.last_is_final and plan.indices[-1] == plan.count - 1:
        rungs[-1] = TokenFeatures(features.summary, features.patches, features.grid)
    return tuple(rungs), features


def plan_rungs(model: nn.Module, rungs: Rungs, image_size: Grid, name: str) -> RungPlan:
    """Resolve ``rungs`` (``all``, ``last`` or indices, negative from the end) for a model.

    Raises:
        ValueError: the family has no intermediate features, or an index is out of range or
            given twice.
    """
    forward = getattr(model, "forward_intermediates", None)
    if forward is None:
        raise ValueError(
            f"{name} cannot be a student: timm gives no forward_intermediates for "
            f"{type(model).__name__}; choose a ViT, Swin, ConvNeXt, EfficientNet or ResNet"
        )
    tokens = "return_prefix_tokens" in inspect.signature(forward).parameters
    options = _TOKENS if tokens else {}

    def outputs(m: nn.Module, images: Tensor) -> list[Any]:
        return list(m.forward_intermediates(images, **options)[1])  # type: ignore[operator]

    found = dry_run(model, image_size, outputs, name)
    count = len(found)
    indices = _resolve(rungs, count, name)
    class_summary = (
        tokens
        and isinstance(found[0], tuple)
        and getattr(model, "global_pool", None) == "token"
        and getattr(model, "cls_token", None) is not None
    )
    plan = RungPlan(indices, count, tokens, class_summary, last_is_final=not tokens)
    if tokens and indices[-1] == count - 1:
        return RungPlan(indices, count, tokens, class_summary, _noisy_head(model, plan, image_size))
    return plan


def _noisy_head(model: nn.Module, plan: RungPlan, image_size: Grid) -> bool:
    """Whether matrices lie between the last block and the summary.

    A norm left at its initial value is harmless (the published UNIC leaves it so); a matrix left
    there, as in attention pooling, makes the exported summary noise.
    """

    def tensors(m: nn.Module, images: Tensor, final: bool) -> list[Tensor]:
        rungs, features = rung_features(m, images, plan)
        return _present((features,)) if final else _present(rungs[-1:])

    by_final = reached_parameters(model, image_size, lambda m, x: tensors(m, x, True))
    by_rung = reached_parameters(model, image_size, lambda m, x: tensors(m, x, False))
    heads = {id(p) for p in _classifier(model).parameters()}
    return any(
        p.ndim > 1 and name in by_final - by_rung and id(p) not in heads
        for name, p in model.named_parameters()
    )


def _present(parts: Sequence[TokenFeatures]) -> list[Tensor]:
    return [t for part in parts for t in (part.summary, part.patches) if t is not None]


def _resolve(rungs: Rungs, count: int, name: str) -> tuple[int, ...]:
    if isinstance(rungs, str):
        if rungs == "all":
            return tuple(range(count))
        if rungs == "last":
            return (count - 1,)
        raise ValueError(f"rungs must be 'all', 'last' or a list of indices, received {rungs!r}")
    if not rungs:
        raise ValueError("rungs must name at least one block or stage, received an empty list")
    for index in rungs:
        if not -count <= index < count:
            raise ValueError(
                f"{name} has {count} rungs: an index must be in [{-count}, {count - 1}], "
                f"received {index}"
            )
    indices = sorted(index % count for index in rungs)
    if len(set(indices)) < len(indices):
        raise ValueError(f"rungs {list(rungs)} of {name} name the same rung twice")
    return tuple(indices)


def _size(images: Tensor) -> Grid:
    return (images.shape[-2], images.shape[-1])


def _flat(feature_map: Tensor) -> tuple[Tensor, Grid]:
    """``(B, D, h, w)`` → ``(B, h·w, D)`` and its grid."""
    grid = (feature_map.shape[2], feature_map.shape[3])
    return feature_map.flatten(2).transpose(1, 2), grid


def _read_rung(output: Any, plan: RungPlan, grid: Grid | None) -> TokenFeatures:
    """A rung; tokens lie on ``grid``, that of the final ones, and a map has its own."""
    found, prefix = output if isinstance(output, tuple) else (output, None)
    patches, grid = (found, grid) if found.ndim == 3 else _flat(found)
    # Registers are prefix tokens too; the class token is the first.
    use_class = plan.class_summary and prefix is not None
    return TokenFeatures(prefix[:, 0] if use_class else patches.mean(dim=1), patches, grid)


def _read_final(model: nn.Module, final: Any, image_size: Grid) -> TokenFeatures:
    if not isinstance(final, Tensor) or final.ndim not in (3, 4):
        raise ValueError(
            f"{type(model).__name__} gives no token or map features "
            f"({type(final).__name__} instead): choose another model"
        )
    summary = model.forward_head(final, pre_logits=True)  # type: ignore[operator]
    if summary.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} does not pool its features (summary of shape "
            f"{tuple(summary.shape)}): give global_pool='avg'"
        )
    patches, grid = _final_patches(model, final, image_size)
    return TokenFeatures(summary, patches, grid, _logits(model, final, summary))


def _classifier(model: nn.Module) -> nn.Module:
    try:
        layer = model.get_classifier()  # type: ignore[operator]
    except AttributeError:
        return nn.Identity()
    if isinstance(layer, (tuple, list)):
        return nn.ModuleList(layer)
    return layer if isinstance(layer, nn.Module) else nn.Identity()


def _logits(model: nn.Module, final: Tensor, summary: Tensor) -> Tensor | None:
    if not getattr(model, "num_classes", 0):
        return None
    layer = _classifier(model)
    if isinstance(layer, nn.Linear) and layer.in_features == summary.shape[-1]:
        logits: Tensor = layer(summary)
        return logits
    # Several or unusual classifiers (distilled DeiT): let timm combine them.
    combined: Tensor = model.forward_head(final)  # type: ignore[operator]
    return combined


def _final_patches(model: nn.Module, final: Tensor, image_size: Grid) -> tuple[Tensor, Grid]:
    if final.ndim == 4:
        if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
            return final.flatten(1, 2), (final.shape[1], final.shape[2])
        return _flat(final)
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:  # volo keeps a class token and does not say so
        prefix = 1 if getattr(model, "global_pool", None) == "token" else 0
    patches = final[:, prefix:]
    return patches, _token_grid(model, patches.shape[1], image_size)


def _token_grid(model: nn.Module, count: int, image_size: Grid) -> Grid:
    """Grid of ``count`` tokens: the patch embedding's word, else the aspect nearest the image's."""
    size_of = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)
    if size_of is not None:
        h, w = size_of(image_size)
        if h * w == count:
            return (int(h), int(w))
    aspect = math.log(image_size[0] / image_size[1])
    divisors = [h for h in range(1, count + 1) if count % h == 0]

    def strain(h: int) -> float:
        return abs(math.log(h * h / count) - aspect)

    h = min(divisors, key=strain)
    return (h, count // h)
