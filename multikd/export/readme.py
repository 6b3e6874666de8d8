"""The model card: a ``README.md`` with a hub's metadata, written for whoever uses the weights."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from multikd.export.card import CardFacts, TeacherFacts, Written
from multikd.export.licences import forbids, hub_fields
from multikd.types import EncoderSpec

CODE_PATH = "PATH"


def readme(spec: EncoderSpec, facts: CardFacts, written: Written) -> str:
    """The card in Markdown. ``PATH`` in its commands stands for the folder."""
    classifier = (
        f" and a classifier of {written.num_classes} classes" if written.num_classes else ""
    )
    height, width = spec.image_size
    parts = [
        _metadata(facts, written),
        f"# {written.architecture}, distilled by multikd",
        _licence(facts),
        f"A timm `{written.architecture}` of {written.parameters / 1e6:.1f} M parameters"
        f"{classifier}, trained on images of {height} × {width} pixels"
        + (f" ({facts.weights} weights)." if facts.weights else "."),
        *_use(spec, written),
        *_heads(facts, written),
        *_classifier(written),
        *_teachers(facts),
        *_results(facts),
        *_cost(facts, written),
        *_made(facts),
        _limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: CardFacts, written: Written) -> str:
    task = "image-classification" if written.num_classes else "image-feature-extraction"
    fields: dict[str, Any] = {
        **hub_fields(facts.binding_licence),
        "library_name": "timm",
        "pipeline_tag": task,
        "tags": [
            *(task, "timm"),
            *([] if written.pruned else ["transformers"]),
            *("knowledge-distillation", "multikd"),
        ],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _licence(facts: CardFacts) -> str:
    binding = facts.binding_licence
    owners = facts.owners_of(binding)
    text = f"## Licence\n\n**{binding}** ({forbids(binding)})"
    if owners:
        text += (
            ": the most restrictive licence of what went into these weights, that of "
            f"{_and(owners)}"
        )
    text += "."
    if not facts.data_licence:
        text += " The licence of the training data was not stated, so it is not counted in."
    return text


def _use(spec: EncoderSpec, written: Written) -> list[str]:
    classes = "" if written.num_classes else ", num_classes=0"
    shape = f"(1, {written.num_classes or spec.widths.summary})"
    if written.output == "tokens":
        shape = "all tokens, or the map"
    load = (
        "With timm alone; weights are only loaded with `pretrained=True`:\n\n"
        "```python\nimport timm\nfrom PIL import Image\n\n"
        f'model = timm.create_model("local-dir:PATH", pretrained=True{classes}).eval()\n'
    )
    if written.pruned:
        load = (
            "It is pruned: single layers are narrower than timm builds them, so that "
            "`student_pruned.py` loads it, with torch and timm alone:\n\n"
            "```python\nimport sys\n\nimport timm\nfrom PIL import Image\n\n"
            'sys.path.insert(0, "PATH")\nimport student_pruned\n\n'
            "model = student_pruned.load()\n"
        )
    parts = [
        f"## Use\n\nThe folder (or its repository) stands in place of `PATH`. {load}"
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        'image = Image.open("image.jpg").convert("RGB")\n'
        f"features = model(transform(image)[None])  # {shape}\n```\n\n"
        f"Inputs are RGB in [0, 1], then `(x - mean) / std` with mean {_triple(spec.mean)} and "
        f"std {_triple(spec.std)}. `model.forward_features` gives the patch features.",
    ]
    if written.output == "pooled" and not written.pruned:
        kind = "AutoModelForImageClassification" if written.num_classes else "AutoModel"
        answer = "logits" if written.num_classes else "pooler_output"
        parts.append(
            "With transformers (its `TimmWrapper` classes):\n\n"
            "```python\nfrom PIL import Image\n"
            f"from transformers import AutoImageProcessor, {kind}\n\n"
            'processor = AutoImageProcessor.from_pretrained("PATH")\n'
            f'model = {kind}.from_pretrained("PATH").eval()\n'
            'image = Image.open("image.jpg").convert("RGB")\n'
            f'features = model(**processor(image, return_tensors="pt")).{answer}\n```'
        )
    for report in written.formats:
        code = _format_code(spec, report)
        if code:
            parts.append(f"`{report['path']}` ({report['format']}):\n\n```python\n{code}\n```")
    if written.formats:
        rows = [_format_row(report) for report in written.formats]
        head = (
            "file",
            "format",
            "MB",
            "largest relative error",
            "cosine to float",
            "k-NN as float",
        )
        parts.append(_table(head, rows))
    return parts


def _format_code(spec: EncoderSpec, report: Mapping[str, Any]) -> str:
    name = str(report["path"])
    if report["format"] == "timm":
        return ""
    height, width = spec.image_size
    uint8 = bool(report.get("settings", {}).get("preprocessing"))
    pixels = (
        'image = Image.open("image.jpg").convert("RGB")\n'
        "pixels = np.asarray(image)  # any size: it is cropped, resized and normalised inside\n"
        if uint8
        else f'image = Image.open("image.jpg").convert("RGB").resize(({width}, {height}), 3)\n'
        f"mean, std = np.float32({list(spec.mean)}), np.float32({list(spec.std)})\n"
        "pixels = (np.asarray(image, np.float32) / 255 - mean) / std\n"
    )
    pixels += "batch = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])\n"
    if name.endswith(".onnx"):
        return (
            "import numpy as np\nimport onnxruntime\nfrom PIL import Image\n\n"
            f'session = onnxruntime.InferenceSession("PATH/{name}")\n{pixels}'
            f"features = session.run(None, {{session.get_inputs()[0].name: batch}})[0]"
        )
    if name.endswith(".safetensors"):
        return (
            "import sys\n\nimport timm\nfrom PIL import Image\n\n"
            'sys.path.insert(0, "PATH")\nimport student_quantized  # torch, timm and torchao\n\n'
            f'model = student_quantized.load("PATH/{name}")  # dequantize=True: without torchao\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
            'image = Image.open("image.jpg").convert("RGB")\n'
            "features = model(transform(image)[None])"
        )
    if name.endswith((".pt2", ".torchscript.pt")):
        load = (
            f'torch.export.load("PATH/{name}").module()'
            if name.endswith(".pt2")
            else f'torch.jit.load("PATH/{name}")'
        )
        return (
            "import numpy as np\nimport torch\nfrom PIL import Image\n\n"
            f"model = {load}\n{pixels}"
            "features = model(torch.from_numpy(batch))"
        )
    return ""


def _format_row(report: Mapping[str, Any]) -> Sequence[str]:
    parity, quality = report.get("parity") or {}, report.get("quality") or {}
    error, cosine = parity.get("max_relative_error"), quality.get("cosine_mean")
    agreement = quality.get("knn_agreement")
    return (
        str(report["path"]),
        str(report["format"]),
        f"{report['bytes'] / 1e6:.1f}",
        "" if error is None else f"{error:.1e}",
        "" if cosine is None else f"{cosine:.4f}",
        "" if agreement is None else f"{100 * agreement:.1f} %",
    )


def _classifier(written: Written) -> list[str]:
    if not written.classifier:
        return []
    names, classes = written.classifier["teachers"], written.classifier["classes"]
    return [
        "## The shared classifier\n\nThe student was trained to be read by the classifier of "
        f"{', '.join(names)}, through a projector ({classes} classes). timm holds the encoder; "
        "`student_classifier.py` adds the rest and needs torch and timm:\n\n"
        "```python\nimport sys\n\nfrom PIL import Image\n\n"
        'sys.path.insert(0, "PATH")\nimport student_classifier\n\n'
        "model = student_classifier.load()\n"
        'images = model.student.preprocess(Image.open("image.jpg"))\n'
        f"logits = model(images)  # (1, {classes})\n```"
    ]


def _heads(facts: CardFacts, written: Written) -> list[str]:
    if not written.heads:
        return []
    rows = [
        (
            name,
            str(about["teacher"].get("encoder", "")),
            str(about["widths"]["summary"] or "none"),
            str(about["widths"]["patches"] or "none"),
            f"{written.head_errors[name]:.1e}",
        )
        for name, about in written.heads.items()
    ]
    name = next(iter(written.heads))
    text = (
        "## Heads of the teachers\n\nEach predicts a teacher's features in that teacher's own "
        "space, from images in [0, 1]. `student_heads.py` needs torch and timm alone:\n\n"
        "```python\nimport sys\n\nfrom PIL import Image\n\n"
        'sys.path.insert(0, "PATH")\nimport student_heads\n\n'
        "student = student_heads.load()\n"
        'images = student.preprocess(Image.open("image.jpg"))\n'
        "features = student.encode(images)  # .summary, .patches, .grid\n"
        f'predicted = student.head("{name}")(images)  # the same, in the teacher\'s space\n```'
    )
    parts = [text, _table(("head", "teacher", "summary", "patches", "folding error"), rows)]
    if facts.weights == "ema":
        parts.append(
            "The heads were trained on the raw weights and are given the averaged ones here."
        )
    clip = next((n for n, a in written.heads.items() if _is_clip(a)), None)
    if clip is not None:
        parts.append(
            f"The head `{clip}` answers in an open_clip model's space, so its text tower "
            "classifies with it (this needs multikd and open_clip):\n\n"
            "```\nimport multikd\n\n"
            'student = multikd.load("PATH")\n'
            f'classify = student.zero_shot("{clip}", ["cat", "dog"], ["a photo of a {{}}."])\n'
            "probabilities = classify(student.preprocess(image))\n```"
        )
    return parts


def _is_clip(about: Mapping[str, Any]) -> bool:
    return str(about["teacher"].get("encoder", "")).startswith("open_clip:")


def _teachers(facts: CardFacts) -> list[str]:
    known = [(t, "") for t in facts.teachers]
    if facts.start is not None:
        known.append((facts.start, " (starting weights)"))
    if not known:
        return []
    rows = [(_linked(t) + what, t.licence, t.source, t.revision[:12] or "–") for t, what in known]
    table = _table(("teacher", "licence", "source", "revision"), rows)
    return [f"## Teachers\n\nTheir licences may bind users of this student.\n\n{table}"]


def _linked(teacher: TeacherFacts) -> str:
    return f"[{teacher.name}]({teacher.link})" if teacher.link else teacher.name


def _results(facts: CardFacts) -> list[str]:
    parts = []
    if facts.scores:
        rows = [(name, f"{100 * value:.1f} %") for name, value in facts.scores.items()]
        parts.append("## Scores\n\n" + _table(("measured", "value"), rows))
    if facts.retention:
        parts.append(
            "## Retention\n\nWhat the student keeps of the best of its teachers, task by task.\n\n"
            + _records(facts.retention)
        )
    if parts and facts.measured_by:
        parts.append(facts.measured_by)
    return parts


def _cost(facts: CardFacts, written: Written) -> list[str]:
    rows = [("parameters", f"{written.parameters:,}")]
    if written.cost is not None:
        if written.cost.macs is not None:
            rows.append(("multiply-adds an image", f"{written.cost.macs / 1e6:,.1f} M"))
        if written.cost.milliseconds is not None:
            rows.append(
                (
                    f"latency, p50, batch 1, one thread ({written.cost.machine})",
                    f"{written.cost.milliseconds:.2f} ms",
                )
            )
    parts = ["## Cost\n\n" + _table(("at the trained image size", ""), rows)]
    return parts + ([_records(facts.costs)] if facts.costs else [])


def _made(facts: CardFacts) -> list[str]:
    parts = [text for text in (facts.data, facts.notes) if text]
    if facts.data_sets:
        sets = [
            (
                str(entry.get("name")),
                str(entry.get("source") or entry.get("urls")),
                str(entry.get("samples", "unknown")),
                str(entry.get("index_sha256") or "not at hand")[:16],
            )
            for entry in facts.data_sets
        ]
        parts.append(_table(("data", "source", "samples", "index sha256"), sets))
    if facts.recipe:
        rows = [(key, str(value)) for key, value in facts.recipe.items()]
        parts.append(_table(("recipe", ""), rows))
    if facts.command:
        parts.append(f"```\n{facts.command}\n```")
    if facts.config:
        parts.append(
            "<details><summary>Full config</summary>\n\n"
            f"<pre>{html.escape(facts.config.strip())}</pre>\n\n</details>"
        )
    return ["## How it was made\n\n" + "\n\n".join(parts)] if parts else []


def _limits(facts: CardFacts) -> str:
    text = (
        "## Bias and limits\n\nA student takes over what its teachers and its images favour, and a "
        "smaller model may lose rare groups first. "
    )
    if facts.gaps:
        text += (
            "Measured gaps between groups of images (a group that is not listed was not measured):"
            f"\n\n{_records(facts.gaps)}\n\n"
        )
    if facts.groups:
        return text + f"Measured by group:\n\n{_records(facts.groups)}"
    return text + (
        "No scores by group were measured for it: measure them on your own data before you rely "
        "on it. Features on images unlike the training data (other sizes, sensors, domains) are "
        "untested unless a table above says so."
    )


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return _table(columns, [[_value(row.get(column)) for column in columns] for row in rows])


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_cell, head)) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _triple(values: tuple[float, float, float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
