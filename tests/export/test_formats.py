import tomllib
from pathlib import Path

import pytest

from multikd.export.formats import FORMATS, find_format, format_table
from multikd.export.report import FormatReport


def test_the_table_has_a_line_for_every_format() -> None:
    lines = format_table().splitlines()
    assert len(lines) == len(FORMATS) + 1
    for one, line in zip(FORMATS, lines[1:], strict=True):
        assert line.startswith(one.name)
        assert one.purpose in line
        assert not one.extra or f"multikd[{one.extra}]" in line
    assert max(map(len, lines)) < 140


def test_every_extra_that_is_named_can_be_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    assert {one.extra for one in FORMATS if one.extra} <= set(extras)


def test_names_and_suffixes_are_unique_and_found() -> None:
    assert len({one.name for one in FORMATS}) == len({one.suffix for one in FORMATS}) == 8
    assert find_format("pt2").suffix == ".pt2"
    with pytest.raises(ValueError, match=r"unknown format 'onx': did you mean 'onnx'"):
        find_format("onx")


def test_a_report_reads_well() -> None:
    parity = {"max_relative_error": 2e-6, "tolerance": 1e-4, "images": "real", "cases": [{}, {}]}
    report = FormatReport(Path("a.onnx"), "onnx", 2_000_000, parity)
    assert report.text() == (
        "onnx: a.onnx (2.0 MB), largest relative error 2.0e-06 over 2 shapes of real images "
        "(allowed 0.0001)"
    )
    assert report.as_dict()["path"] == "a.onnx"
    quality = {"cosine_mean": 0.99, "knn_agreement": 0.5, "queries": 4}
    text = FormatReport(Path("q"), "onnx-int8-static", 1, quality=quality).text()
    assert text.endswith("cosine to float 0.9900, k-NN answers as float on 50.0 % of 4 images")
