"""Encoders by name: what each gives is what its parts give, and weights decide the fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.fitting import Run

from multikd.checkpoints import load_student
from multikd.export.trained_heads import predict, trained_heads
from multikd.retention.digest import fingerprint
from multikd.retention.encoders import OWN, OpenOptions, open_encoders
from multikd.teachers import Teacher

EVERYTHING = OpenOptions(heads="all", with_teachers=True)


def test_a_checkpoint_gives_student_heads_and_teachers(run: Run) -> None:
    columns = {c.name: c for c in open_encoders([f"mine={run.checkpoint}"], EVERYTHING)}
    assert list(columns) == ["mine", "mine+net", "mine+vit", "net", "vit"]
    assert [c.role for c in columns.values()] == ["student", "head", "head", "teacher", "teacher"]
    assert columns["mine+net"].head == "net"
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = columns["mine"].network(images)
    trained = load_student(run.checkpoint)  # the average, as by default
    with torch.no_grad():
        own = trained.student.features(images)
        torch.testing.assert_close(found[OWN].summary, own.summary)
        for head in trained_heads(trained, ["vit", "net"]):
            expected = predict(head, trained.student(images))
            torch.testing.assert_close(found[head.name].summary, expected.summary)
            torch.testing.assert_close(found[head.name].patches, expected.patches)
            assert columns[f"mine+{head.name}"].spec.widths == expected.widths
    teacher = columns["vit"]
    reference = Teacher(teacher.source, resize="none", dtype="float32")
    with torch.no_grad():
        answer = teacher.network(images)[OWN].summary
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, reference(images).summary)


def test_only_does_what_its_member_needs(run: Run) -> None:
    student, net, _ = open_encoders([str(run.checkpoint)], OpenOptions(heads="all"))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert set(student.network.only(OWN)(images)) == {OWN}
        part = net.network.only("net")
        torch.testing.assert_close(
            part(images)["net"].summary, student.network(images)["net"].summary
        )
    everything = sum(p.numel() for p in student.network.parameters())
    assert sum(p.numel() for p in part.parameters()) < everything


def test_an_exported_folder_gives_the_same(run: Run, tmp_path: Path) -> None:
    from multikd.export.commands import ExportSettings, run_export

    run_export(run.checkpoint, tmp_path / "out", ExportSettings(heads=("net",), cost=False))
    images = torch.rand(2, 3, 32, 32)
    by_folder = open_encoders([str(tmp_path / "out")], OpenOptions(heads="all"))
    by_file = open_encoders([str(run.checkpoint)], OpenOptions(heads=("net",)))
    assert [c.role for c in by_folder] == ["student", "head"]
    with torch.no_grad():
        ours, theirs = by_folder[0].network(images), by_file[0].network(images)
    for member in (OWN, "net"):
        torch.testing.assert_close(
            ours[member].summary, theirs[member].summary, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            ours[member].patches, theirs[member].patches, rtol=1e-4, atol=1e-4
        )
    for column in by_folder:
        torch.testing.assert_close(
            column.network.only(column.member)(images)[column.member].summary,
            ours[column.member].summary,
        )


def test_the_smallest_change_of_a_weight_changes_the_fingerprint(run: Run) -> None:
    student = load_student(run.checkpoint).student
    before = fingerprint([student], student.spec)
    assert fingerprint([load_student(run.checkpoint).student], student.spec) == before
    weight = next(student.parameters())
    with torch.no_grad():
        # One unit in the last place of one weight: bfloat16 would not see it.
        flat = weight.view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(10.0))
    assert fingerprint([student], student.spec) != before
    raw = load_student(run.checkpoint, "raw").student
    assert fingerprint([raw], raw.spec) != before


def test_another_normalisation_is_another_fingerprint(run: Run) -> None:
    import dataclasses

    student = load_student(run.checkpoint).student
    spec = dataclasses.replace(student.spec, mean=(0.4, 0.4, 0.4))
    assert fingerprint([student], spec) != fingerprint([student], student.spec)
    named = dataclasses.replace(student.spec, name="else", licence="mit")
    assert fingerprint([student], named) == fingerprint([student], student.spec)


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["missing.ckpt"], OpenOptions(), "there is no encoder missing.ckpt"),
        (["timn:resnet18"], OpenOptions(), "no encoder is called|unknown kind"),
        (["{ckpt}"], OpenOptions(heads=("nett",)), "unknown head 'nett': did you mean 'net'"),
        (["{ckpt}", "{ckpt}"], OpenOptions(), "two encoders are called 'student'"),
        (["{folder}"], OpenOptions(), "no exported student"),
        (["timm:test_vit@none.pth"], OpenOptions(), "no weight file none.pth"),
    ],
)
def test_mistakes(run: Run, tmp_path: Path, texts, options, words) -> None:
    given = [text.format(ckpt=run.checkpoint, folder=tmp_path) for text in texts]
    with pytest.raises(ValueError, match=words):
        open_encoders(given, options)


def test_two_students_share_their_teachers(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "other.ckpt"
    shutil.copy(run.checkpoint, copy)
    columns = open_encoders([f"a={run.checkpoint}", f"b={copy}"], OpenOptions(with_teachers=True))
    assert [c.name for c in columns] == ["a", "net", "vit", "b"]
