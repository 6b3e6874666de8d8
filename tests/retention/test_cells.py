"""Kept results: found again as they were, and never for another question."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from multikd.evaluation import KNN
from multikd.evaluation.retrieval import Retrieval
from multikd.evaluation.task import Task, TaskResult
from multikd.retention import cells as module
from multikd.retention.cells import KeptResult
from multikd.retention.datasets import DataSpec, open_data
from multikd.retention.encoders import open_encoders
from multikd.retention.extract import ExtractOptions
from multikd.retention.subject import EncoderSubject


@pytest.fixture
def subject(photos: Path, tmp_path: Path) -> EncoderSubject:
    data = open_data("p", DataSpec(train=str(photos / "train"), test=str(photos / "test")))
    column = open_encoders(["pooled=retention.test_evaluate.Pooled"])[0]
    return EncoderSubject(column, data, ExtractOptions(tmp_path / "cache", accelerator="cpu"))


@pytest.mark.parametrize("task", [KNN("p", ks=(5,)), Retrieval("p")], ids=["KNN", "Retrieval"])
def test_a_result_comes_back_as_it_was(task: Task, subject: EncoderSubject) -> None:
    assert KeptResult(task, subject, "cpu").read() is None
    result = task.score(subject)
    KeptResult(task, subject, "cpu").write(result)
    found = KeptResult(task, subject, "cpu").read()
    assert found is not None
    assert found.value == result.value
    assert found.statistic is result.statistic
    assert dict(found.metrics) == dict(result.metrics)
    np.testing.assert_array_equal(found.per_sample, result.per_sample)


def test_another_question_is_computed(subject: EncoderSubject, tmp_path, monkeypatch) -> None:
    task = KNN("p", ks=(5,))
    KeptResult(task, subject, "cpu").write(TaskResult(0.5, np.array([0.0, 1.0])))
    assert KeptResult(task, subject, "cpu").read() is not None
    assert KeptResult(KNN("p", ks=(3,)), subject, "cpu").read() is None
    assert KeptResult(task, subject, "cuda").read() is None
    split = subject.splits["test"]
    other = EncoderSubject(subject.column, subject.data, subject.options)
    labels = split.labels.clone()
    labels[0] = 2
    other.splits = {**subject.splits, "test": dataclasses.replace(split, labels=labels)}
    assert KeptResult(task, other, "cpu").read() is None
    other.splits = {**subject.splits, "test": split.without([1])}
    assert KeptResult(task, other, "cpu").read() is None
    path = KeptResult(task, subject, "cpu").path
    path.with_suffix(".npy").write_bytes(b"damaged")
    assert KeptResult(task, subject, "cpu").read() is None
    KeptResult(task, subject, "cpu").write(TaskResult(0.5, np.array([0.0, 1.0])))
    monkeypatch.setattr(module, "_code", lambda: "changed code")
    assert KeptResult(task, subject, "cpu").read() is None


class Own(KNN):
    """A user's own."""


def test_what_is_not_known_is_not_kept(subject: EncoderSubject) -> None:
    assert KeptResult(Own("p"), subject, "cpu").path is None
    kept = KeptResult(KNN("p"), subject, "cpu")
    kept.write(TaskResult(0.5, np.ones(3), statistic=lambda rows: float(rows.sum())))
    assert kept.read() is None
