"""Any ONNX graph as a frozen teacher, run by ONNX Runtime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multikd.backbones.normalize import rgb
from multikd.errors import MissingExtraError, unknown_name
from multikd.teachers.encoder import ImageEncoder
from multikd.types import EncoderSpec, Grid, TokenFeatures

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxEncoder(ImageEncoder):
    """A graph of images ``(B, 3, H, W)`` with named outputs; the batch may be fixed or free.

    An output of two dimensions is a summary ``(B, D)``; of four, a map ``(B, D, h, w)``; of three,
    tokens ``(B, N, D)``, the last h·w of which are the patches. Which outputs are which is said by
    ``summary`` and ``patches``; where neither is given, outputs of these names are taken, or the
    only output there is. Weights stay in the runtime: the teacher's dtype does not apply.

    Args:
        path: the ``.onnx`` file.
        summary: name of the output that is the summary; None for none.
        patches: name of the output that holds the patches; None for none.
        image_size: side in pixels; None takes what the graph says, or 224.
        mean: subtracted from images in [0, 1]; None: 0, for a graph that normalises itself.
        std: divides them; None: 1.
        provider: ``cpu``, ``cuda``, or ``auto`` for CUDA where the runtime has it.
        threads: of the runtime on a CPU; 0 lets it choose.
        licence: for the model card.

    Raises:
        ValueError: no such file, no graph, no such output, or outputs of other shapes.
        MissingExtraError: onnxruntime is not installed.
    """

    place: Tensor

    def __init__(
        self,
        path: str,
        summary: str | None = None,
        patches: str | None = None,
        image_size: int | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        provider: str = "auto",
        threads: int = 0,
        licence: str | None = None,
    ) -> None:
        super().__init__()
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"no ONNX file at {path!r}: give the path of a .onnx file")
        self._session = _session(file, provider, threads)
        self._input = _image_input(self._session, path)
        names = [output.name for output in self._session.get_outputs()]
        self._summary, self._patches = _chosen(names, summary, patches, path)
        self._digest = _digest(file)
        batch, _, height, width = self._input.shape
        self._batch = batch if isinstance(batch, int) and batch > 0 else None
        fixed = isinstance(height, int) and isinstance(width, int)
        side = image_size or 224
        size: Grid = (height, width) if fixed else (side, side)
        if fixed and image_size is not None and size != (image_size, image_size):
            raise ValueError(
                f"{path} takes images of {size} px only, received image_size={image_size}"
            )
        # Tells where images are to come from and go to; it has no weights of its own.
        self.register_buffer("place", torch.zeros(()), persistent=False)
        features = self._run(np.zeros((1, 3, *size), dtype=np.float32), size)
        grid = features.grid or (1, 1)
        self.spec = EncoderSpec(
            name=f"onnx:{path}",
            widths=features.widths,
            image_size=size,
            patch_size=max(1, round(size[0] / grid[0])),
            mean=rgb(mean or (0.0, 0.0, 0.0), "mean"),
            std=rgb(std or (1.0, 1.0, 1.0), "std"),
            fixed_size=fixed,
            licence=licence or "unknown",
            source=path,
        )
        self.set_normalization(self.spec.mean, self.spec.std)
        self._grids[size] = features.grid

    @property
    def variant(self) -> str:
        """The file's content and the outputs that are read."""
        return f"onnx/{self._digest}/{self._summary}/{self._patches}"

    @property
    def providers(self) -> list[str]:
        """What the runtime runs it on."""
        return list(self._session.get_providers())

    def grid_for(self, image_size: Grid) -> Grid | None:
        """See ``ImageEncoder``: found by a run, since the graph has no shapes without data.

        Raises:
            ValueError: the graph does not take this size.
        """
        if image_size not in self._grids:
            zeros = np.zeros((1, 3, *image_size), dtype=np.float32)
            self._grids[image_size] = self._run(zeros, image_size).grid
        return self._grids[image_size]

    def encode(self, images: Tensor) -> TokenFeatures:
        """The named outputs, float32 on the images' device."""
        size = (images.shape[2], images.shape[3])
        pixels = images.detach().float().cpu().numpy()
        return self._run(pixels, size).to(device=images.device)

    def _run(self, pixels: Any, size: Grid) -> TokenFeatures:
        wanted = [name for name in (self._summary, self._patches) if name is not None]
        dtype = _TYPES[self._input.type]
        step = self._batch or len(pixels)
        parts: list[list[Any]] = []
        try:
            for start in range(0, len(pixels), step):
                part = pixels[start : start + step].astype(dtype, copy=False)
                real = len(part)
                if real < step:  # a graph of a fixed batch: the rest repeats the first
                    part = np.concatenate([part, np.repeat(part[:1], step - real, axis=0)])
                outputs = self._session.run(wanted, {self._input.name: part})
                parts.append([output[:real] for output in outputs])
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"the ONNX graph can't take images of {size[0]}×{size[1]} px ({reason}): give "
                "image_size, or a graph with a free batch and size"
            ) from error
        joined = [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
        found = dict(zip(wanted, (tensor.float() for tensor in joined), strict=True))
        return _features(found.get(self._summary or ""), found.get(self._patches or ""), size)


def _features(summary: Tensor | None, patches: Tensor | None, size: Grid) -> TokenFeatures:
    if summary is not None and summary.ndim != 2:
        raise ValueError(
            f"the output named as summary has the shape {tuple(summary.shape)}, expected (B, D): "
            "name it as patches"
        )
    if patches is None:
        return TokenFeatures(summary=summary)
    if patches.ndim == 4:
        grid = (patches.shape[2], patches.shape[3])
        return TokenFeatures(summary, patches.flatten(2).transpose(1, 2), grid)
    if patches.ndim != 3:
        raise ValueError(
            f"the output named as patches has the shape {tuple(patches.shape)}, expected "
            "(B, D, h, w) or (B, N, D): name it as summary"
        )
    grid = _token_grid(patches.shape[1], size)
    return TokenFeatures(summary, patches[:, patches.shape[1] - grid[0] * grid[1] :], grid)


def _token_grid(count: int, size: Grid) -> Grid:
    """The largest grid of the image's shape that so many tokens hold; the rest are prefixes.

    At most 16 prefix tokens: what is left over by more is no grid of this image.

    Raises:
        ValueError: there is none.
    """
    for prefix in range(min(17, count)):
        h = round(((count - prefix) * size[0] / size[1]) ** 0.5)
        w = (count - prefix) // max(h, 1)
        if h * w == count - prefix and h * size[1] == w * size[0]:
            return (h, w)
    raise ValueError(
        f"{count} tokens are no patch grid of a {size[0]}×{size[1]} px image with up to 16 further "
        "tokens: give a graph whose output is a map (B, D, h, w)"
    )


def _session(file: Path, provider: str, threads: int) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "export", f"the teacher onnx:{file}") from error
    names = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    available = onnxruntime.get_available_providers()
    if provider == "auto":
        chosen = [name for name in (names["cuda"], names["cpu"]) if name in available]
    elif provider not in names:
        raise unknown_name("provider of ONNX Runtime", provider, ["auto", *names])
    elif names[provider] not in available:
        raise ValueError(
            f"this ONNX Runtime has no {names[provider]} (it has {', '.join(available)}): install "
            "onnxruntime-gpu, or set provider to cpu"
        )
    else:
        chosen = [names[provider]]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=chosen)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{file} is no ONNX graph that can be run ({reason})") from error


def _image_input(session: Any, path: str) -> Any:
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _TYPES:
        raise ValueError(
            f"{path} takes {', '.join(f'{i.name} {i.shape} {i.type}' for i in inputs)}: a teacher "
            "is a graph of one input of images, float (B, 3, H, W)"
        )
    return inputs[0]


def _chosen(
    names: list[str], summary: str | None, patches: str | None, path: str
) -> tuple[str | None, str | None]:
    for name in (summary, patches):
        if name is not None and name not in names:
            raise unknown_name(f"output of {path}", name, names)
    if summary is None and patches is None:
        summary = "summary" if "summary" in names else None
        patches = "patches" if "patches" in names else None
        if summary is None and patches is None and len(names) == 1:
            return names[0], None
    if summary is None and patches is None:
        raise ValueError(
            f"{path} has the outputs {', '.join(names)}: say which is what with "
            "encoder={class_path: multikd.teachers.OnnxEncoder, init_args: {path: …, summary: …, "
            "patches: …}}"
        )
    return summary, patches


def _digest(file: Path) -> str:
    """SHA-256 of the file and of the weights beside it."""
    digest = hashlib.sha256()
    beside = sorted(p for p in file.parent.glob(f"{file.name}*") if p != file and p.is_file())
    for part in (file, *beside):
        with part.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
