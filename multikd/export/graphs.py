"""Capturing a deployed encoder as a ``torch.export`` program, with as free shapes as it allows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from multikd.export.deployed import DeployedEncoder
from multikd.export.parity import parity_shapes, synthetic_images
from multikd.export.staging import first_line

log = logging.getLogger(__name__)

_NOISY = ("torch.onnx", "torch.export", "torch.utils._pytree", "onnxscript")


@dataclass(frozen=True)
class Captured:
    """A program, and whether it takes images of other sizes than the student's own."""

    program: ExportedProgram
    dynamic_size: bool

    @staticmethod
    def names(dynamic_size: bool) -> list[str]:
        """Names of the free dimensions."""
        return ["batch", "height", "width"] if dynamic_size else ["batch"]


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own internals; what matters is checked afterwards."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def windows_of_one_size(model: nn.Module) -> Iterator[None]:
    """Swin's as timm makes it by default: for images of the model's own size alone.

    A student's Swin takes images of any size. Then windows of symbolic sizes, and the masks that
    its blocks draw anew in every pass, keep a tracer busy for many minutes, to no avail.
    """
    blocks: list[Any] = [m for m in model.modules() if getattr(m, "dynamic_mask", False)]
    stems: list[Any] = [
        m for m in model.modules() if blocks and getattr(m, "strict_img_size", None) is False
    ]
    for block in blocks:
        weight = next(block.parameters())
        block.attn_mask = block.get_attn_mask(device=weight.device, dtype=weight.dtype)
        block.dynamic_mask = False
    for stem in stems:
        stem.strict_img_size = True
    try:
        yield
    finally:
        for block in blocks:
            block.attn_mask = None
            block.dynamic_mask = True
        for stem in stems:
            stem.strict_img_size = False


def capture(encoder: DeployedEncoder, free_size: bool = True) -> Captured:
    """Trace with a free batch, and with a free image size where the model really works with one.

    ``free_size=False`` keeps the student's own size, except of preprocessed images.

    Raises:
        ValueError: ``torch.export`` cannot express the model.
    """
    with windows_of_one_size(encoder):
        return _capture(encoder, free_size)


def _capture(encoder: DeployedEncoder, free_size: bool) -> Captured:
    example = encoder.inputs(synthetic_images(encoder.spec.image_size, count=2)).contiguous()
    free: ExportedProgram | Exception | None = None
    if free_size or encoder.preprocessing:
        free = _export(encoder, example, size=True)
    if isinstance(free, ExportedProgram) and _has_free_size(free) and _runs(encoder, free):
        return Captured(free, dynamic_size=True)
    if encoder.preprocessing:
        raise ValueError(
            f"{encoder.spec.name} cannot be traced with its preprocessing for images of any size"
            + (f" ({first_line(free)})" if isinstance(free, Exception) else "")
            + ": leave preprocessing out"
        )
    fixed = _export(encoder, example, size=False)
    if isinstance(fixed, Exception):
        raise ValueError(
            f"torch.export cannot express {encoder.spec.name} ({first_line(fixed)}): "
            "use the timm folder"
        ) from fixed
    return Captured(fixed, dynamic_size=False)


def _export(encoder: DeployedEncoder, example: Tensor, size: bool) -> ExportedProgram | Exception:
    batch = Dim("batch", min=1)
    dims = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO} if size else {0: batch}
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(encoder, (example,), dynamic_shapes={"images": dims})
    except Exception as error:  # whatever it raises, this way does not work
        log.debug("torch.export of %s (free size: %s): %s", encoder.spec.name, size, error)
        return error


def _has_free_size(program: ExportedProgram) -> bool:
    """Whether batch, height and width stayed symbols: tracing may quietly fix them."""
    names = program.graph_signature.user_inputs
    shape = next(n for n in program.graph.nodes if n.name == names[0]).meta["val"].shape
    return not any(isinstance(shape[axis], int) for axis in (0, 2, 3))


@torch.inference_mode()
def _runs(encoder: DeployedEncoder, program: ExportedProgram) -> bool:
    """Whether it takes the shapes that parity is measured at."""
    try:
        with quiet():
            module = program.module()
            for batch, height, width in parity_shapes(encoder, dynamic_size=True):
                images = encoder.inputs(synthetic_images((height, width), batch))
                module(images.contiguous())
    except Exception as error:  # guards, shape errors: the size is not free after all
        log.debug("%s does not take other sizes: %s", encoder.spec.name, error)
        return False
    return True
