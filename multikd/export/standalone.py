"""A distilled student and its teachers' heads, in plain PyTorch and timm.

This file is complete: it imports torch, timm and safetensors alone, and works on the folder that
it lies in. ``multikd.load`` runs the same code. Weights are read from safetensors; nothing is
unpickled.

    import student_heads
    student = student_heads.load()            # the folder of this file
    images = student.preprocess(pil_image)    # (1, 3, H, W) in [0, 1]
    features = student.encode(images)         # .summary (B, D), .patches (B, N, D), .grid
    dino = student.head("dino")(images)       # the same in the feature space of that teacher

Shapes: B images, N = h·w patches in row-major order, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn import functional

ENCODER, CONFIG, WEIGHTS = "model.safetensors", "heads.json", "heads.safetensors"
# What timm needs to know of the weights; where to fetch others is not of it.
_DESCRIBED = (
    *("architecture", "input_size", "min_input_size", "test_input_size", "fixed_input_size"),
    *("interpolation", "test_interpolation", "crop_pct", "test_crop_pct", "crop_mode"),
    *("mean", "std", "num_classes", "pool_size", "first_conv", "classifier", "license"),
    *("tag", "label_names", "label_descriptions", "notes"),
)


class Features(NamedTuple):
    """Of a batch: ``summary (B, D_s)``, ``patches (B, N, D_p)`` on ``grid (h, w)``."""

    summary: Tensor | None
    patches: Tensor | None
    grid: tuple[int, int] | None


def load(folder: str | Path | None = None, encoder: nn.Module | None = None) -> Student:
    """The student of an exported folder (default: the one that holds this file), in eval mode.

    ``encoder`` is its timm model where timm alone can't build it (a pruned one); None: timm does.

    Raises:
        ValueError: not such a folder.
    """
    place = Path(__file__).parent if folder is None else Path(folder)
    if not (place / "config.json").is_file():
        raise ValueError(f"{place} is no exported student: it has no config.json")
    model = _read_json(place / "config.json")
    about: dict[str, Any] = {"rungs": None, "heads": {}}
    if (place / CONFIG).is_file():
        about = _read_json(place / CONFIG)
    made = model["pretrained_cfg"]
    mean, std = _three(made["mean"]), _three(made["std"])
    # First without memory: a stranger's files may promise more than they hold.
    if encoder is None:
        weights = _shapes(_inside(place, ENCODER))
        _check_arguments(model.get("model_args"), len(weights))
        with torch.device("meta"):
            _fit(_encoder(model), weights, ENCODER)
        encoder = _encoder(model)
        encoder.load_state_dict(load_file(place / ENCODER))
    weights = _shapes(_inside(place, WEIGHTS)) if about["heads"] else {}
    with torch.device("meta"):
        student = Student(nn.Identity(), mean, std, about)
        _fit(student.heads, weights, WEIGHTS)
    student = Student(encoder, mean, std, about)
    if about["heads"]:
        student.heads.load_state_dict(load_file(place / WEIGHTS))
    return student.eval()


def _read_json(path: Path) -> Any:
    if not path.is_file() or path.stat().st_size > 1 << 24:
        raise ValueError(f"{path.name} is no regular file of at most 16 MB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path.name} nests too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return content


def _three(values: Any) -> list[float]:
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"mean and std are three numbers each, not {str(values)[:40]}")
    return [float(value) for value in values]


def _inside(folder: Path, name: str) -> Path:
    """A weight file of this folder; a link out of it is not followed."""
    path = folder / name
    if path.is_symlink() and folder.resolve() not in path.resolve().parents:
        raise ValueError(f"{path} is a link that leads out of its folder")
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    return path


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _fit(model: nn.Module, weights: dict[str, tuple[int, ...]], name: str) -> None:
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in sorted(own.keys() | weights.keys()):
        if own.get(key) != weights.get(key):
            raise ValueError(f"{name}: {key} is {weights.get(key)}, the model needs {own.get(key)}")
    if sum(b.numel() * b.element_size() for b in model.buffers()) > 1 << 30:
        raise ValueError("the model would compute more than a gigabyte of buffers")


def _encoder(about: dict[str, Any]) -> nn.Module:
    """The timm model that ``config.json`` describes, without weights.

    timm's own ``local-dir:`` would take whatever weight file it finds first.
    """
    settings = dict(about.get("model_args") or {})
    if about.get("num_classes") is not None:
        settings.setdefault("num_classes", about["num_classes"])
    name = str(about["architecture"])
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name[:80]!r}")
    described = {k: v for k, v in about["pretrained_cfg"].items() if k in _DESCRIBED}
    return timm.create_model(name, pretrained=False, pretrained_cfg=described, **settings)


def _check_arguments(arguments: Any, blocks: int) -> None:
    """Refuse constructor arguments that would build for hours."""
    if arguments is None:
        return
    if not isinstance(arguments, dict) or len(arguments) > 256:
        raise ValueError("model_args is no mapping of a few settings")
    for name, value in arguments.items():
        numbers = _numbers(value)
        counts = any(part in name.lower() for part in ("depth", "layer", "block"))
        if any(not n <= 1 << 16 for n in numbers) or (counts and sum(numbers) > blocks):
            raise ValueError(f"model_args asks for {name}={str(value)[:40]}: there are no weights")


def _numbers(value: Any, deep: int = 0) -> list[float]:
    if isinstance(value, (bool, str)) or value is None:
        return []
    if isinstance(value, (int, float)):
        return [abs(value)]
    inner = list(value.values()) if isinstance(value, dict) else list(value)
    if deep > 4 or len(inner) > 256:
        raise ValueError("model_args nests too deeply")
    return [number for item in inner for number in _numbers(item, deep + 1)]


class Student(nn.Module):
    """A timm encoder with heads that predict its teachers' features, in their own spaces.

    Images are float ``(B, 3, H, W)`` in [0, 1] throughout; mean and std are applied inside.

    Args:
        encoder: the timm model.
        mean: of the input.
        std: of the input.
        about: the content of ``heads.json``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: nn.Module, mean: list[float], std: list[float], about: dict[str, Any]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.about = about
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.heads = nn.ModuleDict({n: _Ladder(h) for n, h in about["heads"].items()})

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers whose heads are here."""
        return tuple(self.heads)

    def preprocess(self, images: Any) -> Tensor:
        """PIL image(s) → ``(B, 3, H, W)`` in [0, 1], resized and cropped to the student's size."""
        settings = resolve_model_data_config(self.encoder)
        plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        transform = create_transform(**(settings | plain))
        several = images if isinstance(images, (list, tuple)) else [images]
        batch = torch.stack([transform(image.convert("RGB")) for image in several])
        return batch.to(self.mean.device)

    def encode(self, images: Tensor) -> Features:
        """Final features; ``summary`` is what the timm model returns without a classifier."""
        pixels = self._normalize(images)
        return _final(self.encoder, self.encoder.forward_features(pixels), pixels)  # type: ignore[operator]

    def head(self, name: str) -> Callable[[Tensor], Features]:
        """The head of one teacher: images → features in that teacher's space.

        Raises:
            ValueError: there is no such head.
        """
        self._check([name])
        return lambda images: self([name], images)[name]

    def forward(self, names: Collection[str], images: Tensor) -> dict[str, Features]:
        """Several heads from one pass of the encoder."""
        return self.everything(images, names)[1]

    def everything(
        self, images: Tensor, names: Collection[str]
    ) -> tuple[Features, dict[str, Features]]:
        """The student's own features, and those of these heads, from one pass of the encoder."""
        self._check(names)
        if not names:
            return self.encode(images), {}
        pixels = self._normalize(images)
        own, rungs = self._pass(pixels)
        heads = {n: cast(Features, self.heads[n](rungs, _size(pixels))) for n in names}
        return own, heads

    def _check(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self.heads:
                known = ", ".join(self.names) or "none"
                raise ValueError(f"this student has no head {name!r}: its heads are {known}")

    def _normalize(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                "a student needs float images (B, 3, H, W) in [0, 1], received "
                f"{tuple(images.shape)} {images.dtype}"
            )
        dtype = next((p.dtype for p in self.encoder.parameters()), images.dtype)
        return ((images.float() - self.mean) / self.std).to(dtype)

    def _pass(self, pixels: Tensor) -> tuple[Features, list[Features]]:
        plan = self.about["rungs"]
        options = {"return_prefix_tokens": True} if plan["tokens"] else {}
        final, outputs = self.encoder.forward_intermediates(  # type: ignore[operator]
            pixels, indices=plan["indices"], **options
        )
        rungs = []
        for output in outputs:
            grid, prefix = output if isinstance(output, tuple) else (output, None)
            patches = grid.flatten(2).transpose(1, 2)
            use_class = plan["class_summary"] and prefix is not None
            summary = prefix[:, 0] if use_class else patches.mean(dim=1)
            rungs.append(Features(summary, patches, (grid.shape[2], grid.shape[3])))
        own = _final(self.encoder, final, pixels)
        if plan["last_is_final"]:
            rungs[-1] = own
        return own, rungs


class _Ladder(nn.Module):
    """One teacher's projectors, summed over rungs; their last layers answer in its space."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        self.stride = about["stride"]
        self.projectors = nn.ModuleDict({r: _Projector(p) for r, p in about["rungs"].items()})

    def forward(self, rungs: list[Features], size: tuple[int, int]) -> Features:
        grid = None
        if self.stride is not None:
            grid = (
                max(1, round(size[0] / self.stride[0])),
                max(1, round(size[1] / self.stride[1])),
            )
        parts = [p(_resample(rungs[int(r)], grid)) for r, p in self.projectors.items()]
        total = cast(Features, parts[0])
        for part in parts[1:]:
            summary = _add(total.summary, part.summary)
            total = Features(summary, _add(total.patches, part.patches), part.grid)
        return total if total.patches is not None else total._replace(grid=None)


class _Projector(nn.Module):
    """Layers of one rung, as ``heads.json`` lists them."""

    def __init__(self, about: dict[str, Any]) -> None:
        super().__init__()
        blocks = about.get("blocks")
        self.blocks = None if blocks is None else nn.Sequential(*[_block(b) for b in blocks])
        stages = about.get("stages")
        self.stages = None if stages is None else nn.Sequential(*[_Stage(*s) for s in stages])
        self.summary = _layers(about["summary"])
        self.patches = _layers(about["patches"])

    def forward(self, features: Features) -> Features:
        dtype = next(self.parameters()).dtype
        summary, patches = (None if t is None else t.to(dtype) for t in features[:2])
        if summary is None:
            raise ValueError("a head needs a summary of every rung")
        if self.blocks is not None:
            parts = [summary.unsqueeze(1)] + ([] if patches is None else [patches])
            mixed = self.blocks(torch.cat(parts, dim=1))
            summary, patches = mixed[:, 0], None if patches is None else mixed[:, 1:]
        if self.stages is not None and patches is not None and features.grid is not None:
            maps = patches.reshape(len(patches), *features.grid, -1)
            patches = self.stages(maps).flatten(1, 2)
        return Features(
            None if self.summary is None else self.summary(summary),
            None if self.patches is None or patches is None else self.patches(patches),
            features.grid,
        )


class _Stage(nn.Module):
    """A 3×3 convolution of a map ``(B, h, w, D)``, layer norm, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        convolved = self.conv(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return cast(Tensor, self.norm(convolved)).relu()


class _Residual(nn.Sequential):
    """What its layers change, added to their input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]


def _layers(about: list[dict[str, Any]] | None) -> nn.Sequential | None:
    if about is None:
        return None
    kinds: dict[str, Callable[..., nn.Module]] = {
        "linear": nn.Linear,
        "layer_norm": nn.LayerNorm,
        "gelu": nn.GELU,
        "relu": nn.ReLU,
        "silu": nn.SiLU,
    }
    made: list[nn.Module] = []
    for layer in about:
        if layer["kind"] == "residual":
            made.append(_Residual(*cast(nn.Sequential, _layers(layer["layers"]))))
            continue
        settings = {key: value for key, value in layer.items() if key != "kind"}
        made.append(kinds[layer["kind"]](**settings))
    return nn.Sequential(*made)


def _block(about: dict[str, Any]) -> nn.Module:
    from timm.models.vision_transformer import Block

    norm = partial(nn.LayerNorm, eps=about["eps"])
    settings = {key: value for key, value in about.items() if key != "eps"}
    block: nn.Module = Block(**settings, norm_layer=norm)  # type: ignore[arg-type]
    return block


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _size(images: Tensor) -> tuple[int, int]:
    return (images.shape[-2], images.shape[-1])


def _resample(features: Features, grid: tuple[int, int] | None) -> Features:
    """Patches on ``grid``: bilinear, antialiased when shrinking."""
    if features.patches is None or features.grid is None or grid in (None, features.grid):
        return features
    h, w = features.grid
    maps = features.patches.float().reshape(len(features.patches), h, w, -1).permute(0, 3, 1, 2)
    shrinks = grid[0] < h or grid[1] < w
    maps = functional.interpolate(
        maps, size=grid, mode="bilinear", align_corners=False, antialias=shrinks
    )
    return Features(features.summary, maps.permute(0, 2, 3, 1).flatten(1, 2), grid)


def _final(model: nn.Module, final: Tensor, images: Tensor) -> Features:
    summary = model.forward_head(final, pre_logits=True)  # type: ignore[operator]
    if summary.ndim != 2:  # exported without pooling
        summary = None
    if final.ndim == 4:
        last = str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")
        maps = final if last else final.permute(0, 2, 3, 1)
        return Features(summary, maps.flatten(1, 2), (maps.shape[1], maps.shape[2]))
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None:
        prefix = 1 if getattr(model, "global_pool", None) == "token" else 0
    patches = final[:, prefix:]
    return Features(summary, patches, _token_grid(model, patches.shape[1], _size(images)))


def _token_grid(model: nn.Module, count: int, size: tuple[int, int]) -> tuple[int, int]:
    size_of = getattr(getattr(model, "patch_embed", None), "dynamic_feat_size", None)
    if size_of is not None:
        h, w = size_of(size)
        if h * w == count:
            return (int(h), int(w))
    aspect = math.log(size[0] / size[1])
    divisors = [h for h in range(1, count + 1) if count % h == 0]
    h = min(divisors, key=lambda d: abs(math.log(d * d / count) - aspect))
    return (h, count // h)
