"""A small, fixed part of ``tools/soak/fuzz.py``: no mutated file gets past its reader."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools" / "soak"


@pytest.fixture(scope="module")
def soak() -> object:
    sys.path.insert(0, str(TOOLS))
    try:
        import fuzz
        import mutations

        return fuzz, mutations
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.slow
def test_nothing_escapes(soak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    fuzz, _ = soak
    result = fuzz.fuzz(12, limit=30.0)  # the machine may be busy; the command has 10 s
    assert result["escapes"] == []
    for kind, row in result["kinds"].items():
        assert row["read"] + row["refused"] == 12, kind
    # Mutations that no reader minds would prove nothing.
    assert sum(row["refused"] for row in result["kinds"].values()) > 30
    assert sum(row["read"] for row in result["kinds"].values()) > 5


def test_the_judge_tells_our_sentences_from_others(soak, tmp_path: Path) -> None:
    fuzz, _ = soak
    from multikd.checkpoints import read_checkpoint
    from multikd.data.decode import SampleFault

    def raised(call) -> BaseException:
        with pytest.raises(Exception) as caught:
            call()
        return caught.value

    assert fuzz.documented(raised(lambda: read_checkpoint(tmp_path / "none")))
    assert fuzz.documented(SampleFault("empty", "x"))
    assert not fuzz.documented(raised(lambda: int("x")))  # a ValueError, and not ours
    assert not fuzz.documented(raised(lambda: {}["x"]))
    assert not fuzz.documented(MemoryError())


def test_a_case_is_made_again_from_its_number(soak, tmp_path: Path) -> None:
    _, mutations = soak
    made = []
    for turn in range(2):
        folder = tmp_path / str(turn) / "config"
        folder.mkdir(parents=True)
        (folder / "c.yaml").write_text("model: {a: 1, b: [1, 2]}\ntrainer: {c: x}\ndata: {d: 1}\n")
        how = mutations.bits(folder, random.Random("config/3"))
        made.append((how, (folder / "c.yaml").read_bytes()))
    assert made[0] == made[1]
