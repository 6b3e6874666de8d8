"""The student as ONNX, for ONNX Runtime and whatever else reads it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multikd.errors import MissingExtraError
from multikd.export.deployed import DeployedEncoder, Output, as_deployed
from multikd.export.graphs import Captured, capture, quiet
from multikd.export.parity import measure_parity, parity_shapes
from multikd.export.report import FormatReport
from multikd.export.staging import first_line, size_in_bytes, staged, with_suffix
from multikd.export.torch_export import settings_of
from multikd.students import StudentEncoder

DEFAULT_OPSET = 18
# A protobuf file can't exceed 2 GiB; the graph itself needs some of that.
_LARGE = 1 << 30


def require_onnx(purpose: str = "exporting to ONNX") -> None:
    """Raise unless the packages of the extra ``export`` are there.

    Raises:
        MissingExtraError: one is not.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "export", purpose)


def export_onnx(
    source: StudentEncoder | DeployedEncoder,
    out: Path,
    *,
    images: Tensor | None = None,
    opset: int = DEFAULT_OPSET,
    external_data: bool | None = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    preprocessing: bool = False,
    output: Output = "summary",
    classifier: bool = False,
) -> FormatReport:
    """Write an ONNX file with input ``images`` and output ``features``; batch size free.

    The image size is free too where the model allows (``settings["dynamic"]`` says).

    Args:
        source: a student, or an encoder wrapped for deployment (then the last three are not read).
        out: file to write.
        images: to compare on, ``(N, 3, H, W)`` uint8 or float in [0, 1]; None: synthetic.
        opset: of the file. Below 18 a converter has to know every operator of the model.
        external_data: weights in ``OUT.data`` beside the graph; None: where they exceed 1 GiB.
        tolerance: largest relative error of ONNX Runtime against the torch model.
        overwrite: replace an earlier file.
        preprocessing: see :class:`~multikd.export.deployed.DeployedEncoder`.
        output: likewise.
        classifier: keep the trained classifier.

    Raises:
        ValueError: ``out`` exists, ONNX of that opset can't express the model, or it differs.
        MissingExtraError: the extra ``export`` is not installed.
        OSError: it can't be written.
    """
    require_onnx()
    encoder = as_deployed(source, classifier=classifier, preprocessing=preprocessing, output=output)
    if external_data is None:
        external_data = sum(t.numel() * t.element_size() for t in encoder.parameters()) > _LARGE
    out = Path(out)
    with staged(out, overwrite) as path:
        captured = capture(encoder)
        try:
            _convert(captured, encoder.spec.name, path, opset, external_data)
        except ValueError:
            if opset >= DEFAULT_OPSET or not captured.dynamic_size or encoder.preprocessing:
                raise
            # What an old opset lacks is most often the resize of position embeddings.
            captured = capture(encoder, free_size=False)
            _convert(captured, encoder.spec.name, path, opset, external_data)
        run = onnx_runner(path)
        parity = measure_parity(
            encoder, run, parity_shapes(encoder, captured.dynamic_size), images, tolerance
        )
        return FormatReport(
            path=out,
            format="onnx",
            bytes=size_in_bytes(path),
            parity=parity,
            settings=settings_of(encoder, captured.dynamic_size)
            | {"opset": opset, "external_data": external_data},
        )


def _convert(captured: Captured, name: str, path: Path, opset: int, external: bool) -> None:
    import onnx
    from onnx import version_converter

    try:
        with quiet():
            program = torch.onnx.export(
                captured.program,
                (),
                dynamo=True,
                opset_version=max(opset, DEFAULT_OPSET),
                input_names=["images"],
                output_names=["features"],
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter gave nothing")
            program.save(str(path), external_data=external)
        graph = onnx.load(str(path), load_external_data=opset < DEFAULT_OPSET)
        if opset < DEFAULT_OPSET:
            _drop_defaults(graph.graph)
            graph = version_converter.convert_version(graph, opset)
        written = {entry.domain: entry.version for entry in graph.opset_import}[""]
        if written != opset:
            raise RuntimeError(f"it came out as opset {written}")
        _name_dimensions(graph.graph)
        location = with_suffix(path)
        if external and opset < DEFAULT_OPSET:
            location.unlink(missing_ok=True)
            onnx.save(graph, str(path), save_as_external_data=True, location=location.name)
        else:
            onnx.save(graph, str(path))
        with quiet():
            onnx.checker.check_model(str(path))
    except OSError:
        raise
    except Exception as error:  # the exporter, the converter and the checker have their own
        raise ValueError(
            f"ONNX opset {opset} cannot express {name} ({first_line(error)}): "
            "use another opset, or the format pt2"
        ) from error


def _drop_defaults(graph: Any) -> None:
    """Leave out an attribute of its default value that the converter to older opsets trips over."""
    for node in graph.node:
        kept = [a for a in node.attribute if a.name != "noop_with_empty_axes" or a.i != 0]
        if len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)


def _name_dimensions(graph: Any) -> None:
    """Give the free dimensions names that a reader understands, everywhere they occur."""
    names = {}
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        dimension = graph.input[0].type.tensor_type.shape.dim[axis]
        if dimension.dim_param:
            names[dimension.dim_param] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]


def onnx_session(path: Path, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU, with torch's number of threads unless told.

    Raises:
        ValueError: ONNX Runtime doesn't read the file, or lacks an operator of it.
    """
    require_onnx("running ONNX")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} does not run {path.name}: {first_line(error)}"
        ) from error


def onnx_runner(path: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function from the graph's input to its first output, through ONNX Runtime."""
    session = onnx_session(path, threads)
    name = session.get_inputs()[0].name

    def run(inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: inputs.cpu().numpy()})[0])

    return run
