"""The formats a student leaves in: what each is for, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass

from multikd.errors import unknown_name


@dataclass(frozen=True)
class Format:
    """One format of ``multikd export``.

    Attributes:
        name: as given to ``--formats``.
        suffix: of its file below the export folder; empty for the folder itself.
        extra: the pip extra that writing it needs; empty for none.
        reads: what its user needs to load it.
        purpose: what it is for, in a few words.
        quantized: whether it is scored against a float original instead of compared for parity.
    """

    name: str
    suffix: str
    extra: str
    reads: str
    purpose: str
    quantized: bool = False


FORMATS: tuple[Format, ...] = (
    Format("timm", "", "", "timm", "features and fine-tuning in PyTorch, hubs, next runs"),
    Format("onnx", ".onnx", "export", "ONNX Runtime", "serving without PyTorch, on any platform"),
    Format(
        "onnx-int8-static",
        ".int8-static.onnx",
        "export",
        "ONNX Runtime",
        "a quarter of the size, fastest on CPUs; calibrated on shards; CNNs first of all",
        quantized=True,
    ),
    Format(
        "onnx-int8-dynamic",
        ".int8-dynamic.onnx",
        "export",
        "ONNX Runtime",
        "a quarter of the size without calibration; transformers (slow for convolutions)",
        quantized=True,
    ),
    Format("pt2", ".pt2", "", "torch", "PyTorch without timm; input of AOTInductor, ExecuTorch"),
    Format("torchscript", ".torchscript.pt", "", "torch", "libtorch and old mobile runtimes only"),
    Format(
        "torchao-int8",
        ".int8.safetensors",
        "quantize",
        "timm, torchao",
        "small weights in PyTorch; linear layers, so ViT, Swin, ConvNeXt",
        quantized=True,
    ),
    Format(
        "torchao-int4",
        ".int4.safetensors",
        "quantize",
        "timm, torchao",
        "smallest weights in PyTorch; linear layers; score it before you trust it",
        quantized=True,
    ),
)


def find_format(name: str) -> Format:
    """A format by name.

    Raises:
        ValueError: unknown; offers the nearest.
    """
    for one in FORMATS:
        if one.name == name:
            return one
    raise unknown_name(
        "format", name, [one.name for one in FORMATS], "`multikd export --list` shows them"
    )


def format_table() -> str:
    """What ``multikd export --list`` prints: one line a format, columns aligned."""
    rows = [("format", "to write it", "to load it", "for")]
    rows += [
        (one.name, f"multikd[{one.extra}]" if one.extra else "multikd", one.reads, one.purpose)
        for one in FORMATS
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    )
