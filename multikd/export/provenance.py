"""Where exported weights come from: versions, commit, data, seeds."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from multikd.checkpoints import TrainedStudent
from multikd.data.index import read_index
from multikd.data.remote import is_remote
from multikd.data.specs import dataset_facts
from multikd.data.urls import expand_urls
from multikd.redaction import redact_values

PACKAGES = (
    "multikd",
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "open_clip_torch",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that made the weights what they are."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(folder: Path | None = None) -> str | None:
    """The git commit of the code that runs (``+`` behind it: with changes); None without git."""
    place = Path(__file__).parent if folder is None else folder

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(place), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed into somebody else's repository, the commit would be that project's.
    if git("ls-files", "--error-unmatch", ".") is None:
        return None
    head = git("rev-parse", "HEAD")
    if not head:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")


def seeds(config: dict[str, Any]) -> dict[str, Any]:
    """Every seed that the run's config names, by its place there."""
    found: dict[str, Any] = {}

    def walk(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                here = f"{place}.{key}".removeprefix(".").replace(".init_args", "")
                if key in ("seed", "seed_everything"):
                    found[here] = inner
                walk(inner, here)

    walk(config, "")
    return found


def data_facts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Each training data set of a run: where it was, what it is, and the hash of its index.

    The hash is over the shards' names, sizes and sample keys: equal for the same samples in the
    same shards, wherever they lie. It is None where the shards are not (all) on this machine.
    """
    train = config.get("data", {}).get("init_args", {}).get("train")
    sets = train if isinstance(train, dict) else {"train": train}
    if "urls" in sets:  # one DatasetSpec
        sets = {"train": sets}
    facts = []
    for name, given in sets.items():
        settings = given if isinstance(given, dict) else {"urls": given}
        settings = settings.get("init_args", settings)
        entry: dict[str, Any] = {"name": name, "urls": settings.get("urls"), "index_sha256": None}
        if settings.get("weight") is not None:
            entry["weight"] = settings["weight"]
        if settings.get("urls"):
            entry |= _measured(settings["urls"])
        facts.append(entry)
    cleaned: list[dict[str, Any]] = redact_values(facts)
    return cleaned


def _measured(urls: str | list[str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    samples = 0
    try:
        shards = expand_urls(urls)
        if any(is_remote(shard) for shard in shards):
            return {"index_sha256": None, "why": "remote shards are not read again"}
        described = dataset_facts(shards[0])
        for shard in shards:
            index = read_index(shard, allow_truncated=True)
            digest.update(f"{Path(shard).name}\0{index.size}\0".encode())
            digest.update("\0".join(index.keys).encode())
            samples += len(index)
    except (ValueError, OSError, IndexError) as error:
        return {"index_sha256": None, "why": str(error).splitlines()[0]}
    kept = ("source", "classes", "licence", "license")
    return {
        "shards": len(shards),
        "samples": samples,
        "index_sha256": digest.hexdigest(),
        **{key: described[key] for key in kept if described.get(key)},
    }


def recipe(trained: TrainedStudent) -> dict[str, Any]:
    """The settings that a reader looks for first, out of the run's config."""
    model: dict[str, Any] = trained.config.get("model", {}).get("init_args", {})
    data: dict[str, Any] = trained.config.get("data", {}).get("init_args", {})
    trainer: dict[str, Any] = trained.config.get("trainer", {})
    rows = {
        "epochs": trained.epoch,
        "steps": trained.step,
        "batch per process": data.get("batch_size"),
        "processes": f"{trainer.get('num_nodes', 1)} × {trainer.get('devices', 1)}",
        "precision": trainer.get("precision"),
        "optimiser": _named(model.get("optimizer"), "AdamW (UNIC's settings)"),
        "projectors": _named(model.get("projectors"), "MLPProjectors"),
        "target normaliser": _named(model.get("normalizers"), "EMAStandardizers"),
        "loss": _named(model.get("loss"), "FeatureLoss"),
        "teacher dropping": _named(model.get("dropper"), "NoDropping"),
        "target grid": model.get("target_grid"),
        "average of weights": model.get("ema_decay") or "none",
    }
    return {key: value for key, value in rows.items() if value is not None}


def _named(settings: Any, default: str) -> str:
    if not isinstance(settings, dict) or not settings.get("class_path"):
        return default
    arguments = settings.get("init_args") or {}
    chosen = ", ".join(f"{k}={v}" for k, v in arguments.items() if v is not None and v is not False)
    return str(settings["class_path"]).rpartition(".")[2] + (f" ({chosen})" if chosen else "")
