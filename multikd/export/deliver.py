"""The formats beside the timm folder: which were asked for, in which order, and their reports."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multikd.checkpoints import TrainedStudent
from multikd.data.remote import is_remote
from multikd.errors import unknown_name
from multikd.export.calibration import CalibrationSet, calibration_set
from multikd.export.deployed import DeployedEncoder
from multikd.export.formats import FORMATS, Format, find_format
from multikd.export.onnx import export_onnx
from multikd.export.parity import at_shape, measure_parity, parity_shapes, synthetic_images
from multikd.export.prune import PrunedStudent
from multikd.export.quality import QualityLimits
from multikd.export.report import FormatReport
from multikd.export.timm_folder import WEIGHTS, prepared_model, read_model
from multikd.export.torch_export import export_pt2, export_torchscript
from multikd.students import StudentEncoder

if TYPE_CHECKING:
    from multikd.export.commands import ExportSettings

logger = logging.getLogger(__name__)

# Images of the calibration set that each graph is also compared with torch on.
_PARITY_IMAGES = 8
QUANTIZED = {
    "onnx-dynamic": "onnx-int8-dynamic",
    "onnx-static": "onnx-int8-static",
    "int8": "torchao-int8",
    "int4": "torchao-int4",
}


def check_formats(names: Sequence[str], quantize: Sequence[str] = ()) -> list[Format]:
    """The formats of these names, in an order in which each finds what it is made from.

    Raises:
        ValueError: an unknown name; the nearest is offered.
    """
    for name in quantize:
        if name not in QUANTIZED and name not in QUANTIZED.values():
            raise unknown_name("quantised format", name, QUANTIZED)
    chosen = [*names, *(QUANTIZED.get(name, name) for name in quantize)]
    asked = {find_format(name).name for name in chosen}
    if any(name.startswith("onnx-") for name in asked):
        asked.add("onnx")  # quantised from there
    return [f for f in FORMATS if f.name in asked and f.name != "timm"]


def write_formats(
    folder: Path, trained: TrainedStudent, settings: ExportSettings, formats: Sequence[Format]
) -> list[dict[str, Any]]:
    """Write each format as ``model`` + its suffix; returns their reports, paths as file names.

    The first report is of the timm folder, which must be there already.

    Raises:
        ValueError: what a format says of a student that it can't express, of parity or of quality;
            or quantisation without images.
        MissingExtraError: its packages are not installed.
    """
    student = trained.student
    data = _images(trained, settings, any(_is_quantized(f) for f in formats))
    images = None if data is None else data.images[:_PARITY_IMAGES]
    model, _ = prepared_model(student, settings.timm)
    source = DeployedEncoder(model, student.spec, preprocessing=settings.preprocessing)
    limits = QualityLimits()
    if settings.max_cosine_loss is not None:
        limits = replace(limits, cosine_loss=settings.max_cosine_loss)
    if settings.max_agreement_loss is not None:
        limits = replace(limits, agreement_loss=settings.max_agreement_loss)
    reports = [_report(_timm_parity(folder, source, student, images), folder / WEIGHTS)]
    for chosen in formats:
        logger.info("writing %s", chosen.name)
        path = folder / f"model{chosen.suffix}"
        report = _write(chosen, path, source, trained, settings, images, data, limits)
        reports.append(_report(report, path))
    return reports


def _report(report: FormatReport, path: Path) -> dict[str, Any]:
    text = report.text().replace(str(path), path.name)
    return report.as_dict() | {"path": path.name, "text": text}


def _timm_parity(
    folder: Path, source: DeployedEncoder, student: StudentEncoder, images: torch.Tensor | None
) -> FormatReport:
    """The folder as its user loads it beside the student: no difference is allowed."""
    original = DeployedEncoder(source.model, source.spec)
    loaded = read_model(folder, isinstance(student, PrunedStudent))
    own, *_, other = parity_shapes(original, dynamic_size=True)
    try:
        with torch.inference_mode():
            original(original.inputs(at_shape(synthetic_images(other[1:]), other)))
        free = True
    except Exception as error:  # a model of one size says so in its own way
        logger.debug("%s takes images of %s alone: %s", source.spec.name, own[1:], error)
        free = False
    parity = measure_parity(original, loaded, parity_shapes(original, free), images, 0.0)
    path = folder / WEIGHTS
    return FormatReport(path, "timm", path.stat().st_size, parity)


def _write(
    chosen: Format,
    path: Path,
    source: DeployedEncoder,
    trained: TrainedStudent,
    settings: ExportSettings,
    images: torch.Tensor | None,
    data: CalibrationSet | None,
    limits: QualityLimits,
) -> FormatReport:
    if chosen.name == "onnx":
        return export_onnx(source, path, images=images, opset=settings.opset)
    if chosen.name == "pt2":
        return export_pt2(source, path, images=images)
    if chosen.name == "torchscript":
        return export_torchscript(source, path, images=images)
    if data is None:
        raise ValueError(f"{chosen.name} is calibrated and scored on images: give --data SHARDS")
    if chosen.name.startswith("onnx-int8-"):
        from multikd.export.quantize import quantize_onnx

        return quantize_onnx(
            path.with_name(f"model{find_format('onnx').suffix}"),
            path,
            mode="static" if chosen.name.endswith("static") else "dynamic",
            data=data,
            spec=trained.student.spec,
            limits=limits,
        )
    from multikd.export.weight_only import quantize_weights, write_reader

    write_reader(path.parent)
    bits = 4 if chosen.name.endswith("4") else 8
    return quantize_weights(
        trained.student,
        path,
        bits=8 if bits == 8 else 4,
        data=data,
        options=settings.timm,
        limits=limits,
    )


def _is_quantized(chosen: Format) -> bool:
    return chosen.name in QUANTIZED.values()


def _images(
    trained: TrainedStudent, settings: ExportSettings, needed: bool
) -> CalibrationSet | None:
    """Images of ``--data``, or of the run's training shards if they are still where they were."""
    size = trained.student.spec.image_size
    count = settings.images if needed else _PARITY_IMAGES
    if settings.data is not None:
        return calibration_set(settings.data, size, limit=count)
    train = trained.config.get("data", {}).get("init_args", {}).get("train")
    given = [train] if isinstance(train, str) else train if isinstance(train, list) else []
    # Remote shards are worth fetching to calibrate on, and not to look at eight images.
    if given and (needed or not any(is_remote(str(url)) for url in given)):
        try:
            return calibration_set(train, size, limit=count)
        except (ValueError, OSError) as error:
            logger.info("the run's training shards can't be read (%s)", error)
    if needed:
        raise ValueError(
            "quantised formats are calibrated and scored on images, and the run's training shards "
            "are not at hand: give --data SHARDS"
        )
    return None
