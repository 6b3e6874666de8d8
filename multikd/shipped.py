"""Configs that ship with the package, found by name."""

from __future__ import annotations

from pathlib import Path

from multikd.errors import unknown_name

# Folders of fragments: one teacher or one student, to be named inside a config.
FRAGMENT_FOLDERS = ("teachers", "students")
# What `multikd evaluate --tasks` takes.
TASK_FOLDER = "tasks"
# What `multikd ablate` takes.
STUDY_FOLDER = "studies"
# What `multikd stages` takes.
CHAIN_FOLDER = "chains"
# What `multikd sizes` takes.
SEARCH_FOLDER = "sizes"


def config_root() -> Path:
    """The folder of shipped configs: inside the wheel, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name → path of every shipped training config (``classics/rkd`` for one in a folder)."""
    others = (*FRAGMENT_FOLDERS, TASK_FOLDER, STUDY_FOLDER, CHAIN_FOLDER, SEARCH_FOLDER)
    return {n: p for n, p in _all_files().items() if n.split("/")[0] not in others}


def shipped_tasks() -> dict[str, Path]:
    """Name → path of every shipped task file: ``demo`` for ``tasks/demo.yaml``."""
    return _shipped_in(TASK_FOLDER)


def shipped_studies() -> dict[str, Path]:
    """Name → path of every shipped study: ``fashion_mnist`` for ``studies/fashion_mnist.yaml``."""
    return _shipped_in(STUDY_FOLDER)


def shipped_chains() -> dict[str, Path]:
    """Name → path of every shipped chain of stages: ``born_again``."""
    return _shipped_in(CHAIN_FOLDER)


def shipped_searches() -> dict[str, Path]:
    """Name → path of every shipped search of student sizes."""
    return _shipped_in(SEARCH_FOLDER)


def _shipped_in(folder: str) -> dict[str, Path]:
    found = {n: p for n, p in _all_files().items() if n.split("/")[0] == folder}
    return {n.partition("/")[2]: path for n, path in found.items()}


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


def find_tasks(name: str) -> Path:
    """The file that ``--tasks name`` means: an existing path, or else a shipped task file.

    Raises:
        ValueError: neither a file nor a shipped name; the nearest names are offered.
    """
    return _find_in(TASK_FOLDER, "task file", name, shipped_tasks())


def find_study(name: str) -> Path:
    """The file that ``multikd ablate NAME`` means: an existing path, or else a shipped study.

    Raises:
        ValueError: neither a file nor a shipped name; the nearest names are offered.
    """
    return _find_in(STUDY_FOLDER, "study", name, shipped_studies())


def find_chain(name: str) -> Path:
    """The file that ``multikd stages NAME`` means: an existing path, or else a shipped chain.

    Raises:
        ValueError: neither a file nor a shipped name; the nearest names are offered.
    """
    return _find_in(CHAIN_FOLDER, "chain", name, shipped_chains())


def find_search(name: str) -> Path:
    """The file that ``multikd sizes NAME`` means: an existing path, or else a shipped search.

    Raises:
        ValueError: neither a file nor a shipped name; the nearest names are offered.
    """
    return _find_in(SEARCH_FOLDER, "search", name, shipped_searches())


def _find_in(folder: str, what: str, name: str, shipped: dict[str, Path]) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        return path
    stem = _stem(name).removeprefix(f"{folder}/")
    if stem in shipped:
        return shipped[stem]
    raise unknown_name(what, name, shipped, "(or give the path of a YAML file)")


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
