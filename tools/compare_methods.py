"""One table of methods of distillation: same data, same student, same CPU seconds.

    python tools/compare_methods.py --out compare/ --minutes 1 [--methods labels,response]
                                    [--seeds 0,1,2] [--processes 2] [--json F]

Data are the 4,000 + 1,000 images of Fashion-MNIST that ship with the package, teachers the real
EfficientNet-Lite0/1/2 with classifiers fitted on their features where a method needs them (fitting
them is part of the teachers and not counted). The student is a resnet10t on 64 px everywhere. Each
(method, seed) is one process of one thread with a budget of CPU time (see compare_runs.py, which
says what counts); wall time is told beside it. The same command goes on where it was stopped.

Every student is scored by k-NN and logistic regression on its features, and by its own classifier
where it has one. Differences to labels alone are paired by seed. `results.jsonl`, `table.md` and
`table.json` are kept up to date in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare_runs as runs
import torch

from multikd.config_files import load_config
from multikd.demo.embedded import unpack_shards
from multikd.demo.scoring import both_sets
from multikd.errors import unknown_name
from multikd.evaluation.knn import nearest_neighbours
from multikd.files import file_lock, write_text_atomically
from multikd.teachers import Teacher
from multikd.untrusted import read_json

TEACHERS = ("lite0", "lite1", "lite2")
BASELINE = "labels"
SCORES = ("knn", "logistic", "own")
_NEIGHBOURS = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left, and print the table."""
    arguments = parse(argv)
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)  # the shipped configs name multikd-demo/…
    try:
        with file_lock(out / "lock", wait=False):
            prepare(arguments.methods, arguments.quick)
            compare(out, arguments)
    except BlockingIOError:
        raise SystemExit(f"another comparison is working in {out}: name another --out") from None
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder; goes on with what is there"
    )
    parser.add_argument("--methods", default="", help="A,B (default: all; --list names them)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=1.0, help="of CPU time for each run")
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--json", type=Path, default=None, help="write the table here as well")
    parser.add_argument(
        "--quick", action="store_true", help="240 + 100 images, to see that it runs; no result"
    )
    parser.add_argument("--list", action="store_true", help="name the methods and exit")
    if "--list" in (sys.argv if argv is None else argv):
        print("\n".join(runs.METHODS))
        raise SystemExit(0)
    found = parser.parse_args(argv)
    found.methods = [m.strip() for m in found.methods.split(",") if m.strip()] or list(runs.METHODS)
    for name in found.methods:
        if name not in runs.METHODS:
            raise SystemExit(str(unknown_name("method", name, runs.METHODS)))
    try:
        found.seeds = [int(seed) for seed in found.seeds.split(",")]
    except ValueError:
        raise SystemExit(f"--seeds takes numbers such as 0,1,2, received {found.seeds!r}") from None
    if not found.minutes > 0 or found.processes < 1:
        raise SystemExit("--minutes must be above 0 and --processes 1 or more")
    found.json = None if found.json is None else found.json.absolute()
    return found


# --- what all runs share ----------------------------------------------------------------------


def prepare(methods: Sequence[str], quick: bool) -> None:
    """Shards, heads, teachers' own scores and costs, pseudo-labels, caches: each made once."""
    if quick != Path("quick").exists() and Path("multikd-demo").exists():
        raise SystemExit("this folder was made with or without --quick: name another --out")
    if quick and not Path("quick").exists():
        unpack_shards(Path("all"))
        for path in sorted(Path("all").glob("t*/*.tar")):
            shorten(path, Path("multikd-demo/shards") / path.parent.name / path.name)
        Path("quick").touch()
    elif not quick:
        unpack_shards(Path("multikd-demo/shards"))
    if not Path(runs.REFERENCE).exists():
        print("preparing: the teachers' scores and costs", file=sys.stderr)
        child("reference")
    heads = {runs.HEADS: runs.TRAIN, runs.FEW_HEADS: runs.FEW}
    for folder, data in heads.items():
        if len(list(Path(folder).glob("*.safetensors"))) < len(TEACHERS):
            print(f"preparing: classifiers of the teachers ({folder})", file=sys.stderr)
            command("teachers", "fit-head", "--config=classics/response", f"--data={data}",
                    f"--out={folder}", "--overwrite")  # fmt: skip
    if "pseudolabel" in methods and runs.METHODS["pseudolabel"].charge not in reference():
        print("preparing: pseudo-labels of 3,000 images", file=sys.stderr)
        child("pseudolabels")
    for cache in sorted({m.cache for n, m in runs.METHODS.items() if n in methods and m.cache}):
        if not Path(cache, "complete").exists():
            print(f"preparing: {cache}", file=sys.stderr)
            child("cache", cache)
            Path(cache, "complete").touch()


def shorten(path: Path, out: Path) -> None:
    """The first samples of a shard: 60 of a training shard, 100 of the held-out one."""
    count = 60 if path.parent.name == "train" else 100
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as tar, tarfile.open(out, "w", format=tarfile.USTAR_FORMAT) as short:
        for member in tar.getmembers()[: 2 * count]:
            short.addfile(member, tar.extractfile(member))


def child(*arguments: str) -> None:
    """A part of the preparation in a process of one thread."""
    done = subprocess.run([sys.executable, __file__, "--part", *arguments], env=one_thread())
    if done.returncode:
        raise SystemExit(f"preparing {' '.join(arguments)} failed")


def command(*arguments: str) -> None:
    """A multikd command."""
    done = subprocess.run([sys.executable, "-m", "multikd", *arguments], env=one_thread())
    if done.returncode:
        raise SystemExit(f"multikd {' '.join(arguments)} failed")


def one_thread() -> dict[str, str]:
    """The environment of a process whose CPU time is measured."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def reference() -> dict[str, Any]:
    """What was measured of the teachers."""
    found: dict[str, Any] = read_json(Path(runs.REFERENCE))
    return found


def part(name: str, *rest: str) -> int:
    """What ``child`` runs."""
    torch.set_num_threads(1)
    if name == "reference":
        write_text_atomically(Path(runs.REFERENCE), json.dumps(measure_teachers(), indent=1))
    elif name == "pseudolabels":
        begun = time.process_time()
        figures = make_pseudolabels()
        seconds = time.process_time() - begun
        found = {**reference(), "pseudo_seconds": seconds, "pseudo": figures}
        write_text_atomically(Path(runs.REFERENCE), json.dumps(found, indent=1))
    else:
        fill(rest[0])
    return 0


def measure_teachers() -> dict[str, Any]:
    """Scores of each teacher, its leave-one-out k-NN on the train images, and CPU seconds."""
    bank, queries = runs.loaders()
    for loader in (bank, queries):
        list(loader)  # decoded and kept, so that no teacher pays for it
    found: dict[str, Any] = {"fill_seconds": {}, "teachers": {}, "own_knn": {}}
    for name in TEACHERS:
        teacher = Teacher(f"packaged:efficientnet_{name}", resize="none", dtype="float32")
        begun = time.process_time()
        features = both_sets(teacher, bank, queries)
        share = len(features.bank) / (len(features.bank) + len(features.queries))
        found["fill_seconds"][name] = share * (time.process_time() - begun)
        found["teachers"][name] = runs.scores(name, features)
        near = nearest_neighbours(features.bank, features.bank, _NEIGHBOURS + 1).indices[:, 1:]
        votes = torch.nn.functional.one_hot(features.bank_labels[near], 10).sum(1)
        right = votes.argmax(1) == features.bank_labels
        found["own_knn"][name] = float(right.double().mean())
    found["images"], found["held_out"] = len(features.bank), len(features.queries)
    found["best_single"] = max(TEACHERS, key=lambda name: found["own_knn"][name])
    return found


def make_pseudolabels() -> dict[str, Any]:
    """3,000 train images, labelled by the teachers with the classifiers of 1,000 labels."""
    from multikd.pseudolabels.commands import PseudolabelSettings, run_pseudolabel

    heads = [
        f"--model.teachers.{n}.init_args.head={runs.FEW_HEADS}/{n}.safetensors" for n in TEACHERS
    ]
    shards = [f"{runs.TRAIN}/shard-{number:06d}.tar" for number in (1, 2, 3)]
    least = 0.3 if Path("quick").exists() else 0.9  # of so few labels, nothing is sure
    asked = PseudolabelSettings(shards, Path(runs.PSEUDO), least, progress=False)
    text, figures = run_pseudolabel(["--config=classics/response", *heads], asked)
    print(text, file=sys.stderr)
    return figures


def fill(cache: str) -> None:
    """A feature cache of one recorded view of every train image, of all three teachers."""
    from multikd.cache_command import run_cache

    base = "classics/response" if cache.endswith("heads") else "demo"
    config = runs.with_cache(runs.shared_config(load_config(base), seed=0), str(Path(cache)))
    run_cache([f"--config={json.dumps(config)}"], Path(cache), progress=False)


# --- the runs ---------------------------------------------------------------------------------


def compare(out: Path, arguments: argparse.Namespace) -> None:
    """Do what is left, seed by seed, and tell after each."""
    budget = 60.0 * arguments.minutes
    todo = [(name, seed) for seed in arguments.seeds for name in arguments.methods]
    for name, seed in todo:
        found = result(out, name, seed)
        if found is not None and abs(found["budget"] - budget) > 1e-6:
            raise SystemExit(
                f"{out} holds {name} with seed {seed} and {found['budget'] / 60:g} minutes: name "
                "another --out, or the same --minutes"
            )
    left = [one for one in todo if result(out, *one) is None]
    print(f"{len(todo)} runs, {len(left)} to do", file=sys.stderr)
    working: dict[subprocess.Popen[bytes], tuple[str, int]] = {}
    failed: list[str] = []
    try:
        while left or working:
            while left and len(working) < arguments.processes:
                name, seed = left.pop(0)
                working[start(out, name, seed, budget)] = (name, seed)
            for process in [p for p in working if p.poll() is not None]:
                name, seed = working.pop(process)
                if process.returncode or result(out, name, seed) is None:
                    failed.append(f"{name},seed={seed}")
                print(line(out, name, seed), file=sys.stderr)
                tell(out, arguments)
            time.sleep(0.2)
    finally:
        for process in working:
            process.kill()
    table, figures = tell(out, arguments)
    print(table)
    if arguments.json is not None:
        write_text_atomically(arguments.json, json.dumps(figures, indent=1))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)} (runs/NAME/log says why)")


def start(out: Path, name: str, seed: int, budget: float) -> subprocess.Popen[bytes]:
    """A run in a process of one thread."""
    folder = out / "runs" / f"{name},seed={seed}"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(Path(runs.__file__).absolute()), str(out), name, str(seed), str(budget)]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *arguments], env=one_thread(), stdout=log, stderr=log
        )


def result(out: Path, name: str, seed: int) -> dict[str, Any] | None:
    """What came out of a run; None while it is not done."""
    try:
        found = read_json(out / "runs" / f"{name},seed={seed}" / "result.json")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def line(out: Path, name: str, seed: int) -> str:
    """What came out of a run, in a line."""
    found = result(out, name, seed)
    if found is None:
        return f"  {name}, seed {seed}: FAILED, see {out}/runs/{name},seed={seed}/log"
    own = "" if found["own"] is None else f", own {100 * found['own']:.1f}"
    return (
        f"  {name}, seed {seed}: k-NN {100 * found['knn']:.1f}, logistic "
        f"{100 * found['logistic']:.1f}{own}; {sum(found['steps'])} steps, "
        f"{found['cpu_seconds']:.1f} s CPU, {found['wall_seconds']:.1f} s wall"
    )


# --- the table --------------------------------------------------------------------------------


def tell(out: Path, arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Write and return the table (Markdown) and its figures."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in runs.METHODS:  # also those of earlier commands
        rows = [result(out, name, seed) for seed in arguments.seeds]
        found[name] = [row for row in rows if row is not None]
    flat = [row for rows in found.values() for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in flat)
    write_text_atomically(out / "results.jsonl", text)
    known = reference()
    summary = {n: summarised(rows, found[BASELINE]) for n, rows in found.items() if rows}
    figures = {"minutes": arguments.minutes, "reference": known, "methods": summary}
    table = markdown(summary, known, arguments.minutes)
    write_text_atomically(out / "table.md", table + "\n")
    write_text_atomically(out / "table.json", json.dumps(figures, indent=1))
    return table, figures


def summarised(rows: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds, and the differences to the baseline of the same seed."""
    by_seed = {row["seed"]: row for row in base}
    found: dict[str, Any] = {"seeds": [row["seed"] for row in rows], "note": rows[0]["note"]}
    for key in SCORES:
        values = [row[key] for row in rows if row[key] is not None]
        found[key] = spread(values)
        pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
        found[f"{key}_difference"] = spread(
            [a[key] - b[key] for a, b in pairs if a[key] is not None and b[key] is not None]
        )
    for key in ("cpu_seconds", "wall_seconds", "added_parameters", "student_parameters"):
        found[key] = statistics.fmean(row[key] for row in rows)
    found["steps"] = statistics.fmean(sum(row["steps"]) for row in rows)
    found["cached"] = rows[0]["cached"]
    return found


def spread(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and standard deviation (None of a single value); None of none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def markdown(summary: dict[str, Any], known: dict[str, Any], minutes: float) -> str:
    """The table."""
    head = ["method", "seeds", "k-NN", "logistic", "own classifier", "Δ k-NN", "Δ logistic",
            "Δ own", "steps", "CPU s", "wall s", "parameters added", ""]  # fmt: skip
    rows = [head, ["---"] + ["---:"] * (len(head) - 2) + ["---"]]
    for name, row in summary.items():
        best = name == f"ladder_{known['best_single']}"
        note = "; ".join(x for x in (row["note"], "the best single teacher" if best else "") if x)
        rows.append(
            [name, str(len(row["seeds"])), *(shown(row[key]) for key in SCORES)]
            + ["–" if name == BASELINE else shown(row[f"{k}_difference"], "+") for k in SCORES]
            + [f"{row['steps']:.0f}", f"{row['cpu_seconds']:.1f}", f"{row['wall_seconds']:.1f}"]
            + [f"{row['added_parameters'] / 1e6:.2f} M", note]
        )
    for name, row in known["teachers"].items():
        rows.append(
            [f"*{name} itself*", "", *(f"{100 * row[k]:.1f}" for k in ("knn", "logistic"))]
            + [""] * (len(head) - 5)
            + [f"leave-one-out k-NN on train images {100 * known['own_knn'][name]:.1f}"]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.append("")
    lines.append(
        f"Accuracy in % of {known.get('held_out', 1000)} held-out images, mean ± deviation over "
        f"seeds; {60 * minutes:g} s of CPU time (one thread) for each run; "
        "Δ: to labels alone, paired by seed."
    )
    return "\n".join(lines)


def shown(value: dict[str, Any] | None, sign: str = "") -> str:
    """``12.3 ± 0.4`` in percent."""
    if value is None:
        return "–"
    deviation = value["deviation"]
    text = f"{100 * value['mean']:{sign}.1f}"
    return text if deviation is None else f"{text} ± {100 * deviation:.1f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        raise SystemExit(part(*sys.argv[2:]))
    raise SystemExit(main())
