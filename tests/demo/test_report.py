import base64
import builtins
import io
import re

import numpy as np
import pytest
import torch
from helpers.pages import Page
from PIL import Image

from multikd.demo.report import History, NeighbourRow, ReportData, Score, write_report
from multikd.errors import MissingExtraError
from multikd.evaluation import PairedInterval, paired_interval

CLASSES = ("shirt", "boot <left>", "bag")


def gap(difference, low, high):
    return PairedInterval(difference, 0.01, low, high, 0.9, 0.9 - difference, 1000, 0.95)


def data(**changes):
    grey = np.arange(784, dtype=np.uint8).reshape(28, 28)
    colour = np.stack([grey, grey.T, grey], axis=2)
    values = {
        "student": "resnet10t & co",
        "data": "Fashion-MNIST",
        "test_images": 1000,
        "classes": CLASSES,
        "scores": (
            Score("resnet10t", "student", 0.861, 0.893, 4_900_000),
            Score("before", "untrained", 0.671, 0.751, 4_900_000, gap(0.19, 0.16, 0.22)),
            Score("lite0", "teacher", 0.843, 0.869, 3_400_000, gap(0.018, -0.004, 0.04),
                  gap(0.024, 0.006, 0.042)),
            Score("lite1", "teacher", 0.8421, 0.859, 4_000_000, gap(0.019, -0.003, 0.041),
                  gap(0.034, 0.014, 0.054)),
            Score("side by side", "concatenated", 0.869, 0.8931, None, gap(-0.008, -0.03, 0.014)),
        ),
        "history": History(
            epochs=[1, 2, 3],
            loss=[0.9, 0.5, 0.4],
            knn=[None, 0.8, 0.861],
            teacher_losses={"lite0": [0.9, 0.5, 0.4], "lite1": [0.8, 0.6, 0.5]},
        ),
        "neighbours": (
            NeighbourRow(grey, 0, ((grey, 0), (colour, 1))),
            NeighbourRow(colour, 2, ((grey, 2), (grey, 2))),
        ),
        "confusion": np.array([[8, 1, 1], [0, 9, 1], [5, 0, 5]]),
        "command": "multikd demo --out 'a b'",
        "seconds": {"train": 201.25},
        "versions": {"torch": "2.14.1"},
        "facts": {"export": "/tmp/<student>"},
    }  # fmt: skip
    return ReportData(**(values | changes))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = write_report(tmp_path_factory.mktemp("report"), data())
    assert path.name == "report.html"
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def pixels(image):
    return Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))


def test_it_is_one_whole_light_page(page):
    source, parsed = page
    assert parsed.open == []
    assert len(source) < 1_000_000
    assert "script" not in parsed.tags
    assert parsed.tags.count("link") == 1  # an empty icon, so that none is asked for
    assert not re.search(r"""(src|href)=["'](?!data:)""", source)
    assert "url(" not in source
    assert 'name="viewport"' in source


def test_the_headline_claims_no_more_than_the_interval(page):
    text = page[1].text
    assert (
        "86.1 % level with the best teacher, lite0 (84.3 %): +1.8 points, "
        "95 % interval −0.4 to +4.0, paired over 1,000 images" in text
    )
    assert (
        "89.3 % above the best teacher, lite0 (86.9 %): +2.4 points, "
        "95 % interval +0.6 to +4.2, paired over 1,000 images" in text
    )


def test_a_student_below_its_teacher_is_said_to_be_below(tmp_path):
    worse = (
        Score("s", "student", 0.7, 0.7),
        Score("t", "teacher", 0.8, 0.8, None, gap(-0.1, -0.12, -0.08)),
    )
    text = Page(write_report(tmp_path, data(scores=worse)).read_text(encoding="utf-8")).text
    assert "70.0 % below the best teacher, t (80.0 %): −10.0 points, 95 % interval −12.0 to" in text
    assert "70.0 % below the best teacher, t (80.0 %): −10.0 points" in text
    assert "above the best teacher" not in text


def test_the_table_has_every_score(page):
    text = page[1].text
    for words in (
        "resnet10t student of all teachers, 4.9 M parameters 86.1 89.3",
        "before the same student, untrained, 4.9 M parameters 67.1 +19.0 [+16.0, +22.0] 75.1",
        "lite1 teacher, 4.0 M parameters 84.2 +1.9 [−0.3, +4.1] 85.9 +3.4 [+1.4, +5.4]",
        "side by side all teachers' features side by side 86.9 −0.8 [−3.0, +1.4] 89.3",
        "one standard error of an accuracy of 89 % is 1.0 points",
    ):
        assert words in text


def test_pictures_are_real_and_described(page):
    images = page[1].images
    assert all(image["alt"] for image in images)
    plots = [image for image in images if image.get("class") == "plot"]
    assert [image["alt"] for image in plots] == [
        "Bar chart of the table above",
        "Loss and k-NN accuracy by epoch",
        "Loss of each teacher by epoch",
        "Confusion matrix",
    ]
    for image in plots:
        picture = pixels(image)
        assert picture.width == 900
        assert len(np.unique(np.asarray(picture.convert("L")))) > 10


def test_neighbours_are_the_images_given_and_marked_by_class(page):
    source, parsed = page
    thumbnails = [image for image in parsed.images if "class" not in image]
    assert [image["alt"] for image in thumbnails] == [
        "shirt", "shirt", "boot <left>", "bag", "bag", "bag"
    ]  # fmt: skip
    assert np.array_equal(np.asarray(pixels(thumbnails[0])), data().neighbours[0].query)
    assert np.array_equal(np.asarray(pixels(thumbnails[3])), data().neighbours[1].query)
    assert source.count('<figure class="unlike">') == 1
    assert "✗ boot &lt;left&gt;" in source


def test_hardest_classes_and_how_it_was_made(page):
    text = page[1].text
    assert "Hardest: bag (50 %), shirt (80 %), boot <left> (90 %)" in text
    for words in ("multikd demo --out 'a b'", "train 201.2 s", "torch 2.14.1", "/tmp/<student>"):
        assert words in text
    assert "resnet10t & co" in text


def test_what_was_not_measured_is_left_out(tmp_path):
    history = History(epochs=[1], loss=[0.5], knn=[None])
    bare = data(
        scores=(Score("s$x$", "student", 0.0, 1.0),),
        history=history,
        neighbours=(),
        confusion=None,
    )
    source = write_report(tmp_path / "deep" / "my.html", bare).read_text(encoding="utf-8")
    parsed = Page(source)
    assert "Nearest neighbours" not in parsed.text
    assert "confuses" not in parsed.text
    assert len(parsed.images) == 2
    assert (tmp_path / "deep" / "my.html").is_file()


def test_same_data_same_bytes(tmp_path):
    first = write_report(tmp_path / "a", data()).read_bytes()
    assert write_report(tmp_path / "b", data()).read_bytes() == first
    moved = data(history=History([1, 2, 3], [0.9, 0.5, 0.3], [None, 0.8, 0.861]))
    assert write_report(tmp_path / "b", moved).read_bytes() != first


def test_real_intervals_fit_in(tmp_path):
    right = torch.arange(1000) % 10 > 1
    interval = paired_interval(right, right.roll(1))
    scores = (
        Score("s", "student", 0.8, 0.8),
        Score("t", "teacher", 0.8, 0.8, 1, interval, interval),
    )
    text = Page(write_report(tmp_path, data(scores=scores)).read_text(encoding="utf-8")).text
    assert "level with the best teacher, t (80.0 %): +0.0 points" in text


def test_without_matplotlib_the_pip_command_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def hide(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", hide)
    with pytest.raises(MissingExtraError, match=r"pip install 'multikd\[evaluate\]'"):
        write_report(tmp_path, data())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"scores": ()}, "exactly one score of role 'student', received 0"),
        ({"history": History([1, 2], [0.5], [None, None])}, "one value an epoch"),
        (
            {"history": History([1], [0.5], [None], {"t": [0.1, 0.2]})},
            r"received \[1, 2\] values",
        ),
        ({"confusion": np.eye(2, dtype=np.int64)}, "the confusion of 3 classes must be square"),
    ],
)
def test_contradicting_data_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        data(**changes)
