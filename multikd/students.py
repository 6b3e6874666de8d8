"""The student: a timm encoder seen as rungs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multikd.backbones import (
    Normalize,
    build_model,
    dry_run,
    final_features,
    meta_copy,
    native_size,
    plan_rungs,
    reached_parameters,
    rung_features,
    spec_from_model,
)
from multikd.types import TOKEN_TYPES, EncoderSpec, Grid, StudentOutput, TokenFeatures, TokenType

_log = logging.getLogger(__name__)


class StudentEncoder(nn.Module):
    """A trainable timm encoder that gives one ``TokenFeatures`` per rung.

    Rungs of a ViT are the outputs of its blocks before the final norm; their summary is the class
    token where the model pools by it, else the mean of the patches. Rungs of a CNN or a
    hierarchical transformer are its stages (timm's ``feature_info``; summary = mean of the map),
    and the last one is the **final features**, so that a conv head, a final norm or class attention
    is trained too. A ViT with attention pooling ends on its final features for the same reason.

    Args:
        name: timm architecture, or ``architecture.tag`` with ``pretrained``.
        pretrained: start from the tag's weights.
        checkpoint: start from a weight file (safetensors, or a torch state dict).
        image_size: side in pixels of the images it is trained on; None takes the model's own.
        patch_size: patch of a ViT; None takes the model's own.
        rungs: ``all``, ``last``, or indices (negative from the end).
        drop_path: stochastic depth rate.
        grad_checkpointing: recompute activations in the backward pass.
        num_classes: classes of a classifier on the summary; 0 for none.
        mean: of the input; None takes the model's own.
        std: of the input; None takes the model's own.
        global_pool: what the summary is (``token``, ``avg``, ``map``); None keeps the model's.
        model_args: further arguments of timm's constructor of the family (``depth``, ``embed_dim``,
            ``num_heads`` of a ViT, …).
        channels_last: memory layout; faster for CNNs, but rounding differs in the last bits from
            the exported model's default layout.

    Raises:
        ValueError: unknown name, a setting the family lacks, a rung out of range, weights that do
            not fit.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        rungs: Literal["all", "last"] | list[int] = "all",
        drop_path: float = 0.0,
        grad_checkpointing: bool = False,
        num_classes: int = 0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        global_pool: str | None = None,
        model_args: dict[str, Any] | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, received {num_classes}")
        self.model = build_model(
            name,
            pretrained=pretrained,
            checkpoint=checkpoint,
            image_size=image_size,
            patch_size=patch_size,
            drop_path=drop_path,
            num_classes=num_classes,
            global_pool=global_pool,
            model_args=model_args,
        )
        self.num_classes = num_classes
        size = (image_size, image_size) if image_size else native_size(self.model)
        self.plan = plan_rungs(self.model, rungs, size, name)
        seen, final = dry_run(self.model, size, self._run, name)
        self.spec: EncoderSpec = spec_from_model(
            self.model,
            final,
            size,
            name=name,
            mean=mean,
            std=std,
            source=checkpoint or ("hub" if pretrained else "scratch"),
        )
        self.normalize = Normalize(self.spec.mean, self.spec.std)
        self.widths = tuple(rung.widths for rung in seen)
        self.feature_widths = final.widths
        self._grids: dict[Grid, tuple[Grid, ...]] = {}
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if grad_checkpointing:
            self._checkpoint_gradients(name)

    def _checkpoint_gradients(self, name: str) -> None:
        try:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"{name} has no gradient checkpointing: leave grad_checkpointing out"
            ) from error

    def _run(
        self, model: nn.Module, images: Tensor
    ) -> tuple[tuple[TokenFeatures, ...], TokenFeatures]:
        return rung_features(model, images, self.plan)

    def _prepare(self, images: Tensor) -> Tensor:
        """Normalise, and cast to the weights' dtype (``bf16-true``)."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                "a student needs float images (B, 3, H, W) in [0, 1], received "
                f"{tuple(images.shape)} {images.dtype}: divide uint8 by 255 first"
            )
        pixels: Tensor = self.normalize(images)
        pixels = pixels.to(next(self.model.parameters()).dtype)
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return pixels

    def forward(self, images: Tensor) -> StudentOutput:
        """Rungs and final features of one pass. ``images``: float ``(B, 3, H, W)`` in [0, 1]."""
        rungs, features = self._run(self.model, self._prepare(images))
        return StudentOutput(rungs, features)

    def features(self, images: Tensor) -> TokenFeatures:
        """Final features alone; ``summary`` is bit for bit what the exported timm model returns."""
        return final_features(self.model, self._prepare(images))

    def grids(self, image_size: Grid) -> tuple[Grid, ...]:
        """The patch grid of every rung for images of this size."""
        if image_size not in self._grids:
            rungs, _ = dry_run(self.model, image_size, self._run, self.spec.name)
            self._grids[image_size] = tuple(rung.grid or (1, 1) for rung in rungs)
        return self._grids[image_size]

    def freeze_unreached(
        self,
        uses_features: bool,
        tokens: Collection[TokenType] = TOKEN_TYPES,
        reads: Callable[[StudentOutput], Iterable[Tensor]] | None = None,
    ) -> list[str]:
        """Freeze the parameters that no loss reaches, so that DDP waits for none of them.

        Found by a probing backward from the rungs (and from the final features and logits, if
        ``uses_features``), not by names. The published UNIC leaves the final norm so.

        Args:
            uses_features: a loss reads ``StudentOutput.features``.
            tokens: the token types that the ladder reads; none where there is no ladder.
            reads: what else is read of an output.

        Returns:
            Their names (``model.`` prefix included), in the model's order.
        """

        def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
            rungs, final = self._run(model, images)
            found: list[Tensor | None] = []
            for part in rungs:
                found += [part.summary] if "summary" in tokens else []
                found += [part.patches] if "patches" in tokens else []
            if uses_features:
                found += [final.summary, final.patches, final.logits]
            found += [] if reads is None else reads(StudentOutput(rungs, final))
            return [tensor for tensor in found if tensor is not None]

        reached = reached_parameters(self.model, self.spec.image_size, outputs)
        frozen = [name for name, _ in self.model.named_parameters() if name not in reached]
        for name in frozen:
            self.model.get_parameter(name).requires_grad_(False)
        if frozen:
            _log.info("no loss reaches %d student tensors, frozen: %s", len(frozen), frozen)
        noisy = [n for n in frozen if self.model.get_parameter(n).ndim > 1]
        if noisy and self.spec.source == "scratch":
            _log.warning(
                "%d weight matrices of the student stay at their random start (%s, …): the final "
                "features pass through them; add -1 to rungs",
                len(noisy),
                noisy[0],
            )
        return [f"model.{name}" for name in frozen]

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """Weights of the timm model without its classifier, under timm's names."""
        bare = meta_copy(self.model)
        if self.num_classes:
            bare.reset_classifier(0)  # type: ignore[operator]
        keys = set(bare.state_dict())
        return {key: value for key, value in self.model.state_dict().items() if key in keys}

    def export_model(self, classifier: bool = False) -> nn.Module:
        """A plain timm model: a copy in eval mode, without the classifier unless asked for.

        Its ``pretrained_cfg`` carries this student's image size, mean, std and class count.
        """
        model = copy.deepcopy(self.model)
        if self.num_classes and not classifier:
            model.reset_classifier(0)  # type: ignore[operator]
        if self.channels_last:
            model.to(memory_format=torch.contiguous_format)
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(False)  # type: ignore[operator]
        config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
        config.update(
            input_size=(3, *self.spec.image_size),
            mean=self.spec.mean,
            std=self.spec.std,
            num_classes=self.num_classes if classifier else 0,
        )
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model.eval().requires_grad_(True)
