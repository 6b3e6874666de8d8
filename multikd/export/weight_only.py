"""int8 or int4 weights through torchao: activations stay float, linear layers only.

The file is safetensors: integers (two int4 a byte), scales, the other weights in float32, and
timm's arguments as metadata. Reading it needs torch, timm and torchao, and runs nothing in it;
``standalone_quantized`` is the reader, and goes along as ``student_quantized.py``.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from multikd.backbones import Normalize
from multikd.errors import MissingExtraError
from multikd.export import standalone_quantized
from multikd.export.calibration import CalibrationSet
from multikd.export.card import CardFacts
from multikd.export.graphs import quiet
from multikd.export.prune import PrunedStudent
from multikd.export.quality import QualityLimits, compare_features, features_of, halves, judge
from multikd.export.report import FormatReport
from multikd.export.staging import first_line, size_in_bytes, staged
from multikd.export.standalone_quantized import FORMAT, pack_int4
from multikd.export.timm_folder import TimmOptions, prepared_model, timm_config
from multikd.students import StudentEncoder

MODULE = "student_quantized.py"
_DTYPES = {8: torch.int8, 4: torch.int4}  # type: ignore[attr-defined]


def require_torchao(purpose: str) -> None:
    """Raise unless torchao is there.

    Raises:
        MissingExtraError: it is not.
    """
    if find_spec("torchao") is None:
        raise MissingExtraError("torchao", "quantize", purpose)


def quantize_weights(
    student: StudentEncoder,
    out: Path,
    *,
    bits: Literal[8, 4],
    data: CalibrationSet,
    group_size: int = 32,
    options: TimmOptions | None = None,
    limits: QualityLimits | None = None,
    overwrite: bool = False,
) -> FormatReport:
    """Write the student with integer weights in its linear layers; read with ``load_weight_only``.

    int8 has a scale per output channel, int4 one per ``group_size`` inputs; both are symmetric.
    Convolutions, norms, biases, embeddings, and (int4) layers whose inputs are no multiple of the
    group stay float: ``settings["share"]`` is the share of parameters that became integers.

    Args:
        student: not changed.
        out: file to write.
        bits: 8 or 4.
        data: images to score with: k-NN bank and queries are its halves.
        group_size: inputs that share a scale (int4).
        options: classifier, output and final norm, as of the timm folder; None: its defaults.
        limits: what may be lost; None: the default ones.
        overwrite: replace an earlier file.

    Raises:
        QualityError: it loses more than ``limits`` allows; nothing is written.
        ValueError: no linear layer to quantise (a pure CNN), or ``out`` exists.
        MissingExtraError: the extra ``quantize`` is not installed.
        OSError: it can't be written.
    """
    require_torchao("weight-only quantisation")
    if isinstance(student, PrunedStudent):
        raise ValueError("weight-only files hold no pruned student: use onnx-int8-static")
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, received {bits}")
    chosen = TimmOptions() if options is None else options
    original, arguments = prepared_model(student, chosen)
    quantised = prepared_model(student, chosen)[0].requires_grad_(False)
    names = _quantize(quantised, bits, group_size)
    if not names:
        raise ValueError(
            f"{student.spec.name} has no linear layer that weight-only quantisation to int{bits} "
            "could take: use onnx-int8-static"
        )
    out = Path(out)
    with staged(out, overwrite) as path:
        config = timm_config(original, student.spec, CardFacts(), arguments)
        _save(path, quantised, names, bits, config)
        loaded = load_weight_only(path)
        bank, queries = halves(data)

        def prepare(images: Tensor) -> Tensor:
            normalised: Tensor = Normalize(student.spec.mean, student.spec.std)(
                images.float() / 255
            )
            return normalised

        def both(model: nn.Module) -> tuple[Tensor, Tensor]:
            first, second = (features_of(model, s.images, prepare) for s in (bank, queries))
            return first, second

        quality = compare_features(both(original), both(loaded), (bank.labels, queries.labels))
        total = sum(p.numel() for p in original.parameters())
        integers = sum(original.get_parameter(name).numel() for name in names)
        report = FormatReport(
            path=out,
            format=f"torchao-int{bits}",
            bytes=size_in_bytes(path),
            quality=quality,
            settings={
                "bits": bits,
                "group_size": group_size if bits == 4 else None,
                "layers": len(names),
                "share": integers / total,
                "size_of_float": size_in_bytes(path) / (4 * total),
            },
        )
        return judge(report, limits or QualityLimits(), student.spec.name)


def _quantize(model: nn.Module, bits: int, group_size: int) -> list[str]:
    """Quantise in place; returns the names of the weights that became integers."""
    with quiet():
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup

        chosen = [
            name
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "NonDynamicallyQuantizableLinear")
            and isinstance(module, nn.Linear)
            and (bits == 8 or module.in_features % group_size == 0)
        ]
        config = IntxWeightOnlyConfig(
            weight_dtype=_DTYPES[bits],
            granularity=PerAxis(0) if bits == 8 else PerGroup(group_size),
        )
        quantize_(model, config, filter_fn=lambda _, name: name in chosen)
    return [f"{name}.weight" for name in chosen]


def _save(
    path: Path, model: nn.Module, names: list[str], bits: int, config: dict[str, Any]
) -> None:
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if name not in names:
            tensors[name] = tensor.detach().contiguous().clone()
            continue
        integers: Any = tensor
        qdata: Tensor = integers.qdata
        weights[name] = list(integers.block_size)
        tensors[f"{name}.qdata"] = pack_int4(qdata) if bits == 4 else qdata.contiguous()
        tensors[f"{name}.scale"] = integers.scale.contiguous()
    about = {"format": FORMAT, "bits": bits, "weights": weights, "config": config}
    try:
        save_file(tensors, path, metadata={"multikd": json.dumps(about)})
    except Exception as error:  # safetensors has its own exception for a full disk
        raise OSError(f"{path.name} could not be written ({first_line(error)})") from error


def load_weight_only(path: Path | str) -> nn.Module:
    """The timm model of a file that :func:`quantize_weights` wrote, in eval mode.

    Raises:
        ValueError: not such a file.
        MissingExtraError: the extra ``quantize`` is not installed.
    """
    require_torchao("reading weight-only quantised files")
    with quiet():
        return standalone_quantized.load(path)


def write_reader(folder: Path) -> None:
    """Put the module that reads such files without multikd into a folder."""
    source = Path(standalone_quantized.__file__).read_text(encoding="utf-8")
    (folder / MODULE).write_text(source, encoding="utf-8")
