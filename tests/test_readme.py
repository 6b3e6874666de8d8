"""What the README promises stands: its two commands, its files, and CI that runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_two_commands_are_one_line_each() -> None:
    first, second = blocks()[:2]
    assert first.strip().count("\n") == 0
    assert second.strip().count("\n") == 0
    assert first.strip().endswith("&& multikd demo")
    assert second.strip().endswith("&& pytest")


def test_ci_runs_the_readmes_test_command() -> None:
    install, test = re.search(r"activate && (pip .*?) && (pytest)", blocks()[1]).groups()  # type: ignore[union-attr]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert install.replace("pip install", "pip install --quiet") in script
    assert script.rstrip().endswith(test)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(multikd\.[a-z_.]+)", README))))
def test_named_modules_exist(path: str) -> None:
    base = ROOT.joinpath(*path.split("."))
    assert base.is_dir() or base.with_suffix(".py").is_file(), f"README names {path}"


def test_named_configs_exist() -> None:
    for name in re.findall(r"--config ([a-z0-9_/]+)", README):
        if name != "mine":  # the reader's own copy
            assert (ROOT / "configs" / f"{name}.yaml").is_file(), f"README names config {name}"


def test_top_level_is_what_was_agreed() -> None:
    allowed = {
        "pyproject.toml",
        "README.md",
        "multikd",
        "configs",
        "tests",
        "tools",
        "LICENSE",
        "CHANGELOG.md",
    }
    import subprocess

    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\n")
    if listed == [""]:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed if name and not name.startswith(".")}
    assert top <= allowed
