"""Mutated files against every reader: what does not end in a sentence of ours is an escape.

    python tools/soak/fuzz.py --cases 1000 --json fuzz.json

Of each kind (shard, index, cache, checkpoint, config, export, manifest) a sound file is made, then
mutated: bits flipped, cut short, pieces joined, lengths overwritten, and edits that know the format
(a tar header or a zip entry changed and its checksum put right, JSON values of other types and
sizes, links, ``..``, compressed parts). Readers run in processes of their own, with bounded memory.
An escape is any exception but the documented ones, a case over ``--limit`` seconds, a process that
dies, a file outside the case's folder, or code that ran (a canary). Seeds are numbers: a case is
made again from (kind, number).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

KINDS = ("shard", "index", "cache", "checkpoint", "config", "export", "manifest")
MEMORY = 3 << 30  # bytes that a case may allocate beyond what the process has when it begins
CANARY = "multikd-fuzz-canary"


# --- sound files -----------------------------------------------------------------------------


def make_samples(folder: Path) -> None:
    """One sound file or folder of each kind, small and real."""
    import numpy as np
    import torch
    from PIL import Image

    from multikd.data.cache import CacheSource, FeatureCacheWriter
    from multikd.data.index import build_index
    from multikd.data.writer import write_shards
    from multikd.types import Batch, TokenFeatures

    rng = np.random.default_rng(0)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
    photos = folder / "photos"
    for number in range(12):
        place = photos / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        image.save(place / f"{number}.{'jpg' if number % 3 else 'png'}")
    write_shards(photos, folder / "manifest", samples_per_shard=6, workers=0)
    shard = folder / "manifest" / "shard-000000.tar"
    (folder / "shard" / "a.tar").write_bytes(shard.read_bytes())
    (folder / "index" / "a.tar").write_bytes(shard.read_bytes())
    (folder / "index" / "a.tar.index.npz").write_bytes(build_index(shard).to_bytes())

    source = CacheSource("abc", (3, 2), 2, {"name": "EvalViews", "size": 32}, 0)
    example = TokenFeatures(summary=torch.randn(2, 4), patches=torch.randn(2, 4, 3), grid=(2, 2))
    writer = FeatureCacheWriter(folder / "cache", source, {"vit": ("f1", example)})
    for start in range(0, 10, 2):
        rows = torch.arange(start, start + 2)
        places = [torch.from_numpy(p) for p in source.places_of(rows.numpy())]
        batch = Batch(
            [torch.zeros(2, 3, 4, 4, dtype=torch.uint8)],
            torch.zeros(2, dtype=torch.int64),
            ["a", "b"],
            places[0],
            rows,
            places[1],
            recorded=places[2],
        )
        writer.put(batch, "vit", example)
    writer.finish()
    _make_run(folder)
    shutil.rmtree(photos)


def _make_run(folder: Path) -> None:
    """A config, the checkpoint of its run and the export of that, through the commands."""
    import timm
    import torch
    import yaml

    from multikd.cli import main

    torch.manual_seed(0)
    teacher = timm.create_model("test_vit", num_classes=0, img_size=32)
    torch.save(teacher.state_dict(), folder / "teacher.pth")
    config = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "save_on_train_epoch_end": True},
                }
            ],
        },
        "model": {
            "teachers": {
                "vit": {
                    "class_path": "multikd.teachers.Teacher",
                    "init_args": {
                        "encoder": "timm:test_vit",
                        "checkpoint": str(folder / "teacher.pth"),
                        "image_size": 32,
                    },
                }
            },
            "student": {
                "class_path": "multikd.students.StudentEncoder",
                "init_args": {"name": "test_vit2", "image_size": 32, "rungs": "last"},
            },
            "projectors": {"class_path": "multikd.projectors.LinearProjectors"},
        },
        "data": {
            "train": str(folder / "manifest"),
            "train_views": {
                "class_path": "multikd.data.views.LightViews",
                "init_args": {"size": 32},
            },
            "batch_size": 4,
            "num_workers": 0,
        },
    }
    path = folder / "config" / "c.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        done = main(["fit", f"--config={path}"])
        checkpoint = folder / "run" / "last.ckpt"
        out = folder / "exported"
        done += main(["export", str(checkpoint), str(out), "--heads", "vit", "--no-cost"])
    if done:
        raise RuntimeError("the sound run could not be made")
    shutil.copy(checkpoint, folder / "checkpoint" / "c.ckpt")
    for file in out.iterdir():
        if file.is_file():
            shutil.copy(file, folder / "export" / file.name)
    shutil.rmtree(out)
    shutil.rmtree(folder / "run")


# --- readers ---------------------------------------------------------------------------------


def read_shard(folder: Path) -> None:
    """Index, read and decode everything; as a stream, too."""
    from multikd.data.inspection import inspect_shards
    from multikd.data.remote import RemoteCache
    from multikd.data.sequential import SequentialShards
    from multikd.data.views import LightViews

    said: ValueError | None = None
    try:
        inspect_shards(str(folder / "a.tar"), index_dir=folder)
    except ValueError as error:
        said = error
    stream = SequentialShards(
        [str(folder / "a.tar")], [LightViews(16)], 2, 2, remote=RemoteCache(folder, 1 << 20)
    )
    for batch in stream:
        len(batch)
    if said is not None:
        raise said


def read_index_file(folder: Path) -> None:
    """As beside a local shard, and as published beside a remote one."""
    from multikd.data.decode import SampleFault
    from multikd.data.index import ShardIndex
    from multikd.data.sources import ShardSource

    said: ValueError | None = None
    try:
        index = ShardIndex.from_bytes((folder / "a.tar.index.npz").read_bytes())
        for sample in range(min(len(index), 1000)):
            index.key(sample)
            index.members(sample)
    except ValueError as error:
        said = error
    source = ShardSource(str(folder / "a.tar"), index_dir=folder / "i")
    for sample in range(len(source)):
        source.key(0, sample)
        with contextlib.suppress(SampleFault):
            source.read_members(0, sample)
    source.close()
    if said is not None:
        raise said


def read_cache(folder: Path) -> None:
    """Read every row, then open it for writing."""
    import torch

    from multikd.data.cache import CacheSource, FeatureCache, FeatureCacheWriter
    from multikd.types import TokenFeatures

    source = CacheSource("abc", (3, 2), 2, {"name": "EvalViews", "size": 32}, 0)
    cache = FeatureCache(folder, source)
    cache.check({"vit": "f1"})
    missing = set(cache.missing(["vit"]).tolist())
    cache.get([row for row in range(source.rows) if row not in missing])
    example = TokenFeatures(summary=torch.zeros(2, 4), patches=torch.zeros(2, 4, 3), grid=(2, 2))
    FeatureCacheWriter(folder, source, {"vit": ("f1", example)}).finish()


def read_ckpt(folder: Path) -> None:
    """Build the student, and read what a card says."""
    from multikd.checkpoints import load_student
    from multikd.export.provenance import data_facts, recipe, seeds
    from multikd.export.sources import start_facts

    trained = load_student(folder / "c.ckpt")
    data_facts(trained.config)
    recipe(trained)
    seeds(trained.config)
    start_facts(trained.config)


def read_config_file(folder: Path) -> None:
    """Parse and build, without weights; nothing runs."""
    from multikd.backbones import skeleton
    from multikd.fit import build_cli

    with skeleton():
        build_cli([f"--config={folder / 'c.yaml'}"], run=False)


def read_export(folder: Path) -> None:
    """As a student to use, and as a teacher."""
    import torch

    import multikd
    from multikd.teachers import load_encoder

    said: ValueError | None = None
    try:
        loaded = multikd.load(folder)
        for name in loaded.heads:
            loaded.head(name)
    except ValueError as error:
        said = error
    encoder = load_encoder(f"exported:{folder}")
    del encoder, torch
    if said is not None:
        raise said


def read_manifest_file(folder: Path) -> None:
    """Continue the write, inspect, and name classes."""
    from multikd.data.inspection import inspect_shards
    from multikd.data.manifest import WriteLog, read_manifest
    from multikd.data.specs import dataset_facts

    read_manifest(folder)
    WriteLog(folder).read()
    inspect_shards(str(folder), index_dir=folder / "i", limit=2)
    dataset_facts(str(folder / "shard-000000.tar"))


READERS: dict[str, Callable[[Path], None]] = {
    "shard": read_shard,
    "index": read_index_file,
    "cache": read_cache,
    "checkpoint": read_ckpt,
    "config": read_config_file,
    "export": read_export,
    "manifest": read_manifest_file,
}


def documented(error: BaseException) -> bool:
    """Whether an exception is one of ours: a sentence about the file."""
    from multikd.data.decode import SampleFault
    from multikd.errors import MissingExtraError

    if isinstance(error, SampleFault | MissingExtraError):
        return True
    if isinstance(error, FileNotFoundError):  # a cache that is not there
        return error.filename is not None
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    raised_by_us = bool(frames) and f"{os.sep}multikd{os.sep}" in frames[-1].filename
    return raised_by_us and len(str(error)) < 3000


# --- the pool --------------------------------------------------------------------------------


def _serve(pipe: Connection) -> None:
    """Run cases as they come: (kind, folder) → (outcome, detail)."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _warm_up()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    null = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stdout = sys.stderr = null
    import logging

    logging.disable(logging.CRITICAL)
    pipe.send(("ready", ""))
    while True:
        try:
            kind, folder = pipe.recv()
        except EOFError:
            return
        os.chdir(folder)
        try:
            READERS[kind](Path(folder))
            outcome = ("read", "")
        except BaseException as error:
            name = type(error).__name__
            if documented(error):
                outcome = ("refused", f"{name}: {error}"[:200])
            else:
                lines = "".join(traceback.format_exception(error))[-2500:]
                outcome = ("escape", f"{name}: {str(error)[:200]}\n{lines}")
        pipe.send(outcome)


def _warm_up() -> None:
    """Import what readers need, before memory is counted."""
    import timm  # noqa: F401


class Worker:
    """A process that reads cases, started again when one kills or hangs it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["multikd.fit", "multikd.export.load"])
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(180):
            raise RuntimeError("a reader process does not start")
        self._pipe.recv()

    def read(self, kind: str, folder: Path) -> tuple[str, str, float]:
        """Outcome, detail and seconds of a case."""
        begun = time.monotonic()
        self._pipe.send((kind, str(folder)))
        try:
            if self._pipe.poll(self.limit):
                outcome, detail = self._pipe.recv()
                return outcome, detail, time.monotonic() - begun
            outcome, detail = "escape", f"hang: over {self.limit} s"
        except EOFError:
            self._process.join()
            outcome, detail = "escape", f"the process died ({self._process.exitcode})"
        seconds = time.monotonic() - begun
        self.close()
        self._start()
        return outcome, detail, seconds

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


# --- a run -----------------------------------------------------------------------------------


def run_case(
    worker: Worker, kind: str, number: int, samples: Path, scratch: Path
) -> dict[str, Any]:
    """Mutate, read, and look around for what should not be there."""
    from mutations import mutate

    home = scratch / "case"
    shutil.rmtree(home, ignore_errors=True)
    folder = home / "inner" / kind
    folder.parent.mkdir(parents=True)
    shutil.copytree(samples / kind, folder)
    outside = home / "outside.txt"
    outside.write_text("precious", encoding="utf-8")
    how = mutate(folder, kind, random.Random(f"{kind}/{number}"), outside, CANARY)
    outcome, detail, seconds = worker.read(kind, folder)
    strange = sorted(str(p.relative_to(home)) for p in home.rglob("*") if CANARY in p.name)
    strange += [p.name for p in home.iterdir() if p.name not in ("inner", "outside.txt")]
    strange += [p.name for p in folder.parent.iterdir() if p.name != kind]
    if strange:
        outcome, detail = "escape", f"code ran, or a file outside: {strange}"
    elif outside.read_text(encoding="utf-8") != "precious":
        outcome, detail = "escape", "a file outside was changed"
    return {
        "kind": kind,
        "number": number,
        "mutation": how,
        "outcome": outcome,
        "detail": detail,
        "seconds": round(seconds, 3),
    }


def fuzz(
    cases: int, kinds: tuple[str, ...] = KINDS, first: int = 0, limit: float = 10.0, say: Any = None
) -> dict[str, Any]:
    """Run ``cases`` of each kind, numbers ``first`` and up.

    Returns:
        Counts by kind and outcome, the slowest case, and every escape with its traceback.
    """
    begun = time.monotonic()
    examples: dict[str, list[str]] = {kind: [] for kind in kinds}
    table: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    mutations: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    escapes: list[dict[str, Any]] = []
    slowest = dict.fromkeys(kinds, 0.0)
    took = dict.fromkeys(kinds, 0.0)
    with tempfile.TemporaryDirectory(prefix="multikd-fuzz-") as name:
        scratch = Path(name)
        make_samples(scratch / "sound")
        worker = Worker(limit)
        try:
            for kind in kinds:
                started = time.monotonic()
                sound = worker.read(kind, _copy(scratch / "sound" / kind, scratch / "check" / kind))
                if sound[0] != "read":
                    raise RuntimeError(f"the sound {kind} is not read: {sound[1]}")
                for number in range(first, first + cases):
                    case = run_case(worker, kind, number, scratch / "sound", scratch)
                    table[kind][case["outcome"]] += 1
                    mutations[kind][case["mutation"]] += 1
                    slowest[kind] = max(slowest[kind], case["seconds"])
                    if case["outcome"] == "refused" and len(examples[kind]) < 20:
                        examples[kind].append(f"{case['mutation']}: {case['detail']}")
                    if case["outcome"] == "escape":
                        escapes.append(case)
                took[kind] = time.monotonic() - started
                if say is not None:
                    say(f"{kind:<11} {dict(table[kind])} in {took[kind]:.0f} s")
        finally:
            worker.close()
    return {
        "cases": cases,
        "first": first,
        "seconds": round(time.monotonic() - begun, 1),
        "kinds": {
            kind: {
                **{name: table[kind][name] for name in ("read", "refused", "escape")},
                "slowest_s": round(slowest[kind], 2),
                "seconds": round(took[kind], 1),
                "mutations": dict(mutations[kind].most_common()),
                "refusals": examples[kind],
            }
            for kind in kinds
        },
        "escapes": escapes,
    }


def _copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target)
    return target


def text(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{'kind':<12}{'cases':>7}{'read':>7}{'refused':>9}{'escapes':>9}{'slowest':>10}{'took':>8}"
    ]
    for kind, row in result["kinds"].items():
        lines.append(
            f"{kind:<12}{result['cases']:>7}{row['read']:>7}{row['refused']:>9}{row['escape']:>9}"
            f"{row['slowest_s']:>8.2f} s{row['seconds']:>6.0f} s"
        )
    for case in result["escapes"][:20]:
        first = case["detail"].splitlines()[0]
        lines.append(f"escape: {case['kind']} {case['number']} ({case['mutation']}): {first}")
    return "\n".join(lines)


def main() -> int:
    """Run from the command line; 1 where there was an escape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each kind (default: 1000)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of a case")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    kinds = tuple(arguments.kinds.split(","))
    result = fuzz(
        arguments.cases,
        kinds,
        arguments.first,
        arguments.limit,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(text(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 1 if result["escapes"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
