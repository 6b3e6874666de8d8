"""The student as ``torch.export``'s ``.pt2`` or as TorchScript: plain torch runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from multikd.export.deployed import DeployedEncoder, Output, as_deployed
from multikd.export.graphs import Captured, capture, quiet
from multikd.export.parity import Runner, measure_parity, parity_shapes, synthetic_images
from multikd.export.report import FormatReport
from multikd.export.staging import first_line, size_in_bytes, staged, writing
from multikd.students import StudentEncoder


def export_pt2(
    source: StudentEncoder | DeployedEncoder,
    out: Path,
    *,
    images: Tensor | None = None,
    tolerance: float = 1e-5,
    overwrite: bool = False,
    preprocessing: bool = False,
    output: Output = "summary",
    classifier: bool = False,
) -> FormatReport:
    """Write a ``.pt2`` that ``torch.export.load(out).module()`` runs without timm and without us.

    Args:
        source: a student, or an encoder wrapped for deployment (then the last three are not read).
        out: file to write.
        images: to compare on, ``(N, 3, H, W)`` uint8 or float in [0, 1]; None: synthetic.
        tolerance: largest relative error against the torch model.
        overwrite: replace an earlier file.
        preprocessing: see :class:`~multikd.export.deployed.DeployedEncoder`.
        output: likewise.
        classifier: keep the trained classifier.

    Raises:
        ValueError: ``out`` exists, the model can't be expressed, or it differs too much.
        OSError: it can't be written.
    """
    encoder = as_deployed(source, classifier=classifier, preprocessing=preprocessing, output=output)
    out = Path(out)
    with staged(out, overwrite) as path:
        captured = capture(encoder)
        with quiet(), writing(path):
            torch.export.save(captured.program, path)
        with quiet():
            run = torch.export.load(path).module()
        return _checked(path, out, "pt2", encoder, captured.dynamic_size, run, images, tolerance)


def export_torchscript(
    source: StudentEncoder | DeployedEncoder,
    out: Path,
    *,
    images: Tensor | None = None,
    tolerance: float = 1e-5,
    overwrite: bool = False,
    preprocessing: bool = False,
    output: Output = "summary",
    classifier: bool = False,
) -> FormatReport:
    """Write a traced TorchScript file, for runtimes that read nothing newer (libtorch, mobile).

    torch no longer develops TorchScript: prefer ``.pt2``. The image size is the student's own,
    except with ``preprocessing``. Arguments and errors are those of :func:`export_pt2`.
    """
    encoder = as_deployed(source, classifier=classifier, preprocessing=preprocessing, output=output)
    out = Path(out)
    with staged(out, overwrite) as path:
        example = encoder.inputs(synthetic_images(encoder.spec.image_size, count=2)).contiguous()
        try:
            with quiet(), torch.no_grad():
                traced = torch.jit.trace(encoder, example, check_trace=False)
        except Exception as error:
            raise ValueError(
                f"TorchScript cannot express {encoder.spec.name} ({first_line(error)}): use pt2"
            ) from error
        with quiet(), writing(path):
            torch.jit.save(traced, path)
        with quiet():
            run: Callable[[Tensor], Tensor] = torch.jit.load(path)
        return _checked(path, out, "torchscript", encoder, False, run, images, tolerance)


def _checked(
    path: Path,
    out: Path,
    name: str,
    encoder: DeployedEncoder,
    dynamic_size: bool,
    run: Runner,
    images: Tensor | None,
    tolerance: float,
) -> FormatReport:
    with quiet():
        parity = measure_parity(
            encoder, run, parity_shapes(encoder, dynamic_size), images, tolerance
        )
    return FormatReport(
        path=out,
        format=name,
        bytes=size_in_bytes(path),
        parity=parity,
        settings=settings_of(encoder, dynamic_size or encoder.preprocessing),
    )


def settings_of(encoder: DeployedEncoder, dynamic_size: bool) -> dict[str, object]:
    """What a user of the file must know of its input and output."""
    return {
        "dynamic": Captured.names(dynamic_size),
        "preprocessing": encoder.preprocessing,
        "input": "uint8 RGB" if encoder.preprocessing else "float32, (x - mean) / std",
        "output": encoder.output,
        "image_size": list(encoder.spec.image_size),
    }
