"""Configs that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from multikd.errors import unknown_name

# Folders of fragments: one teacher or one student, to be named inside a config.
FRAGMENT_FOLDERS = ("teachers", "students")


def config_root() -> Path:
    """The folder of shipped configs: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name → path of every shipped training config (``classics/rkd`` for one in a folder)."""
    return {n: p for n, p in _all_files().items() if n.split("/")[0] not in FRAGMENT_FOLDERS}


def shipped_fragments() -> dict[str, Path]:
    """Name → path of every shipped fragment: ``teachers/dino_vitb16``, ``students/vit_demo``."""
    return {n: p for n, p in _all_files().items() if n.split("/")[0] in FRAGMENT_FOLDERS}


def _all_files() -> dict[str, Path]:
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
    stem = _stem(name)
    if stem in configs:
        return configs[stem]
    if path.is_dir():
        raise ValueError(f"{name} is a folder: give a YAML file in it")
    raise unknown_name("config", name, configs, "(or give the path of a YAML file)")


def find_fragment(name: str, beside: Path | None = None) -> Path | None:
    """The file of a fragment named inside a config or on the command line.

    Args:
        name: ``teachers/dino_vitb16.yaml`` or any path that ends in ``.yaml`` or ``.yml``.
        beside: folder of the config that names it; None for the working directory.

    Returns:
        A file beside the config, else a shipped one; None when it is neither.

    Raises:
        ValueError: a name in a fragment folder that is neither; the nearest are offered.
    """
    if not name.endswith((".yaml", ".yml")) or "\n" in name:
        return None
    path = (beside or Path()) / Path(name).expanduser()
    try:
        if path.is_file():
            return path
    except OSError:  # a name that no file system takes
        return None
    fragments = shipped_fragments()
    stem = _stem(name)
    if stem in fragments:
        return fragments[stem]
    if stem.split("/")[0] in FRAGMENT_FOLDERS:
        raise unknown_name("fragment", name, [f"{n}.yaml" for n in fragments])
    return None


def _stem(name: str) -> str:
    return name.removesuffix(".yaml").removesuffix(".yml").removeprefix("configs/")
