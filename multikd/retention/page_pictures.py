"""Nearest neighbours and patch components on the page, encoders beside one another."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from multikd.pages.html import strip, thumbnail
from multikd.retention.gallery import Gallery
from multikd.retention.reading import Encoder, Results, mapping, number, order


def neighbours(results: Results, gallery: Gallery) -> str:
    """Strips of each encoder: the first student's open, the others' behind their names."""
    parts = []
    for data, by in _by_data(results, "neighbours").items():
        blocks: list[str] = []
        for encoder, found in by.items():
            rows = [_neighbour_row(query, gallery) for query in _list(found, "queries")]
            rows = [markup for markup in rows if markup]
            if rows:
                opened = " open" if not blocks else ""
                blocks.append(
                    f"<details{opened}><summary>{escape(encoder.name)}</summary>{''.join(rows)}"
                    "</details>"
                )
        if blocks:
            parts.append(f"<h3>{escape(data)}</h3>" * bool(data) + "".join(blocks))
    if not parts:
        return ""
    return (
        "<p>Left: a held-out image. Right: the train images that the encoder finds most like it, "
        "by the cosine of their features; a red frame and ✗ mark another class.</p>"
        + "".join(parts)
    )


def _neighbour_row(query: Mapping[str, Any], gallery: Gallery) -> str:
    label = query.get("class")
    first = gallery.read(query.get("picture"))
    if first is None:
        return ""
    figures = [thumbnail(first, _name(label), "query", f"held out: {_name(label) or 'image'}")]
    for near in _list(query, "neighbours"):
        png = gallery.read(near.get("picture"))
        if png is None:
            continue
        name, cosine = _name(near.get("class")), number(near.get("similarity"))
        unlike = label is not None and near.get("class") is not None and near["class"] != label
        alt = f"{name or 'image'}" + ("" if cosine is None else f", cosine {cosine:.2f}")
        figures.append(thumbnail(png, name, "unlike" if unlike else "same", alt))
    return strip(figures)


def components(results: Results, gallery: Gallery) -> str:
    """One strip an image: the image, then the components of every encoder's patch tokens."""
    parts = []
    for data, by in _by_data(results, "pca").items():
        count = max((len(_list(found, "images")) for found in by.values()), default=0)
        rows = []
        for index in range(count):
            figures: list[str] = []
            for encoder, found in by.items():
                images = _list(found, "images")
                image = images[index] if index < len(images) else {}
                drawn, own = gallery.read(image.get("map")), gallery.read(image.get("picture"))
                if drawn is None:
                    continue
                name = _name(image.get("class"))
                if not figures and own is not None:
                    figures.append(thumbnail(own, name, "query", name or "image"))
                alt = f"components of {encoder.name}" + (f" on {name}" if name else "")
                figures.append(thumbnail(drawn, encoder.name, "", alt))
            if len(figures) > 1:
                rows.append(strip(figures, "maps"))
        if rows:
            shares = "; ".join(
                f"{encoder.name} {_explained(found)}"
                for encoder, found in by.items()
                if _explained(found)
            )
            parts.append(
                f"<h3>{escape(data)}</h3>" * bool(data)
                + "".join(rows)
                + f'<p class="small">{escape(shares)}</p>' * bool(shares)
            )
    if not parts:
        return ""
    return (
        "<p>The first three principal components of the patch tokens as red, green and blue, one "
        "square a patch. Each encoder has its own components: compare what is set apart, not the "
        "colours. Below: the share of the variance that each explains.</p>" + "".join(parts)
    )


def _explained(found: Mapping[str, Any]) -> str:
    shares = found.get("explained")
    values = [number(v) for v in shares] if isinstance(shares, list) else []
    known = [f"{100 * v:.0f} %" for v in values if v is not None]
    return ", ".join(known)


def _by_data(results: Results, key: str) -> dict[str, dict[Encoder, Mapping[str, Any]]]:
    """Data set → encoder → what was drawn; of several tasks on a data set, the first."""
    found: dict[str, dict[Encoder, Mapping[str, Any]]] = {}
    ordered = order(results.encoders)
    for task in results.tasks:
        for encoder in ordered:
            cell = results.cells.get((task.name, encoder.name))
            shown = mapping(cell.details.get(key)) if cell is not None else {}
            if shown:
                found.setdefault(task.data, {}).setdefault(encoder, shown)
    return {data: {e: by[e] for e in ordered if e in by} for data, by in found.items()}


def _list(found: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = found.get(key)
    return [mapping(item) for item in value] if isinstance(value, list) else []


def _name(label: Any) -> str:
    return label if isinstance(label, str) else ""
