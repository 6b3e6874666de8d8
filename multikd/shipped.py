"""Configs that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from multikd.errors import unknown_name


def config_root() -> Path:
    """The folder of shipped configs: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name → path of every shipped training config (``classics/rkd`` for one in a folder).

    Files whose folder is named ``teachers`` or ``students`` are fragments: they are shipped, and
    found with their folder's name, but are no config by themselves.
    """
    root = config_root()
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.yaml"))
    }


def find_config(name: str) -> Path:
    """The file that ``--config name`` means: an existing path, or else a shipped config.

    Raises:
        ValueError: neither a file nor a shipped name; the nearest names are offered.
    """
    path = Path(name)
    if path.is_file():
        return path
    configs = shipped_configs()
    stem = name.removesuffix(".yaml").removeprefix("configs/")
    if stem in configs:
        return configs[stem]
    raise unknown_name(
        "config", name, configs, "(a path to a YAML file works as well; `multikd fit --help`)"
    )
