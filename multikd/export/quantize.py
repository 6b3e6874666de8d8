"""int8 for ONNX Runtime: weights alone with activations measured at run time, or calibrated."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from multikd.backbones import Normalize
from multikd.export.calibration import CalibrationSet
from multikd.export.graphs import quiet
from multikd.export.onnx import onnx_runner, require_onnx
from multikd.export.quality import QualityLimits, compare_features, features_of, halves, judge
from multikd.export.report import FormatReport
from multikd.export.staging import first_line, size_in_bytes, staged
from multikd.types import EncoderSpec

QuantizeMode = Literal["dynamic", "static"]

_CALIBRATION_IMAGES = 256
_WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
# Between convolutions these would otherwise go back to float and cost more than they save. Among
# attention and LayerNorm they only lose accuracy.
_BETWEEN_CONVOLUTIONS = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool")
_TRANSFORMER = {"LayerNormalization", "Softmax", "Gelu", "Erf"}


def quantize_onnx(
    source: Path,
    out: Path,
    *,
    mode: QuantizeMode,
    data: CalibrationSet,
    spec: EncoderSpec,
    limits: QualityLimits | None = None,
    overwrite: bool = False,
) -> FormatReport:
    """Quantise a float ONNX that :func:`~multikd.export.onnx.export_onnx` wrote.

    ``static`` calibrates on the first half of ``data`` (256 images of it at most) and asks k-NN on
    the second: int8 weights per channel, uint8 activations, quantise-dequantise nodes. ``dynamic``
    needs no calibration and measures each activation as it runs; it suits transformers, and is
    slower than float for convolutions. Preprocessing in the graph stays in float.

    Args:
        source: the float file.
        out: file to write.
        mode: see above.
        data: images of the student's size, from shards.
        spec: of the student: mean and std.
        limits: what may be lost; None: the default ones.
        overwrite: replace an earlier file.

    Raises:
        QualityError: it loses more than ``limits`` allows; nothing is written.
        ValueError: ``source`` is missing or can't be quantised, or ``out`` exists.
        MissingExtraError: the extra ``export`` is not installed.
        OSError: it can't be written.
    """
    require_onnx("quantising for ONNX Runtime")
    if mode not in ("dynamic", "static"):
        raise ValueError(f"mode must be 'dynamic' or 'static', received {mode!r}")
    source, out = Path(source), Path(out)
    if not source.is_file():
        raise ValueError(f"there is no ONNX file {source} to quantise: export the float one first")
    with staged(out, overwrite) as path:
        original = onnx_runner(source)
        prepare = _Prepare(source, spec)
        bank, queries = halves(data)
        settings = _quantize(source, path, mode, prepare, bank)
        quantised = onnx_runner(path)
        sets = (bank.images, queries.images)
        quality = compare_features(
            _pair([features_of(original, images, prepare) for images in sets]),
            _pair([features_of(quantised, images, prepare) for images in sets]),
            (bank.labels, queries.labels),
        )
        size = size_in_bytes(path)
        report = FormatReport(
            path=out,
            format=f"onnx-int8-{mode}",
            bytes=size,
            quality=quality,
            settings=settings | {"size_of_float": size / size_in_bytes(source)},
        )
        return judge(report, limits or QualityLimits(), spec.name)


class _Prepare:
    """The graph's input from uint8 images: as they are where the graph preprocesses."""

    def __init__(self, source: Path, spec: EncoderSpec) -> None:
        import onnx

        graph = onnx.load(str(source), load_external_data=False).graph
        if len(graph.input) != 1:
            raise ValueError(
                f"{source} has {len(graph.input)} inputs instead of one: it is not ours"
            )
        self.name: str = graph.input[0].name
        self.in_graph = graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
        self.normalize = Normalize(spec.mean, spec.std)

    def __call__(self, images: Tensor) -> Tensor:
        if self.in_graph:
            return images
        normalised: Tensor = self.normalize(images.float() / 255)
        return normalised


def _quantize(
    source: Path, path: Path, mode: QuantizeMode, prepare: _Prepare, bank: CalibrationSet
) -> dict[str, Any]:
    import onnx
    from onnxruntime.quantization import (
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = path.with_name("optimised.onnx")
    large = size_in_bytes(source) > 1 << 30
    try:
        with _silent():
            quant_pre_process(
                str(source), str(ready), skip_symbolic_shape=True, save_as_external_data=large
            )
            graph = onnx.load(str(ready), load_external_data=False).graph
            kinds = {node.op_type for node in graph.node}
            untouched = before_weights(graph)
            settings: dict[str, Any] = {"mode": mode, "weights": "int8 per channel"}
            if mode == "dynamic":
                # ONNX Runtime's integer convolution is several times faster with uint8 weights.
                unsigned = "Conv" in kinds and not kinds & _TRANSFORMER
                quantize_dynamic(
                    str(ready),
                    str(path),
                    weight_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
                    per_channel=not unsigned,
                    op_types_to_quantize=list(_WITH_WEIGHTS),
                    nodes_to_exclude=untouched,
                    use_external_data_format=large,
                    extra_options={"MatMulConstBOnly": True},
                )
                if unsigned:
                    settings["weights"] = "uint8 per tensor"
                return settings
            operators = list(_WITH_WEIGHTS)
            if not kinds & _TRANSFORMER:
                operators += _BETWEEN_CONVOLUTIONS
            images = bank.images[:_CALIBRATION_IMAGES]
            quantize_static(
                str(ready),
                str(path),
                _reader(prepare, images),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=operators,
                nodes_to_exclude=untouched,
                use_external_data_format=large,
                extra_options={"MatMulConstBOnly": True},
            )
            return settings | {"activations": "uint8", "calibration_images": len(images)}
    except OSError:
        raise
    except Exception as error:  # whatever the quantiser raises
        raise ValueError(
            f"ONNX Runtime cannot quantise {source.name} ({first_line(error)}): keep it in float"
        ) from error
    finally:
        for left in (ready, ready.with_name(ready.name + ".data")):
            left.unlink(missing_ok=True)


def before_weights(graph: Any) -> list[str]:
    """Names of the nodes that come before any weighted one: preprocessing, which stays float.

    Args:
        graph: an ONNX GraphProto in topological order (as ONNX demands).
    """
    weights = {tensor.name for tensor in graph.initializer}
    weights |= {out for node in graph.node if node.op_type == "Constant" for out in node.output}
    # Values that depend on a weighted operator.
    after: set[str] = set()
    names = []
    for node in graph.node:
        weighted = node.op_type in _WITH_WEIGHTS and any(name in weights for name in node.input[1:])
        if weighted or any(name in after for name in node.input):
            after.update(node.output)
        else:
            names.append(node.name)
    return names


def _reader(prepare: _Prepare, images: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.starts = iter(range(0, len(images), 32))

        def get_next(self) -> dict[str, Any] | None:
            start = next(self.starts, None)
            if start is None:
                return None
            return {prepare.name: prepare(images[start : start + 32]).numpy()}

    return Images()


@contextmanager
def _silent() -> Iterator[None]:
    """ONNX Runtime's quantiser logs advice at the root logger that we have followed already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), torch.inference_mode():
            yield
    finally:
        logging.disable(before)


def _pair(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return parts[0], parts[1]
