"""SIGKILL at random moments, resume, and compare with the uninterrupted run, bit for bit.

    python tools/soak/kill_resume.py --kills 50 --kills-ranks 20 [--seed 0] [--json FILE]

Each run is ``multikd fit --resume auto`` on a small mixture of shards, in processes forked from
this one (which has imported everything, so that a cycle costs a second or two): one process with 0
and with 2 loader workers, and two gloo ranks with 0 and 2 workers each. Runs differ in model,
balancer, dropping, accumulation and seed. The moment of a kill is random: so many steps further
than before, and up to 80 ms more, which also meets checkpoints that are being written. Of two ranks
one is killed, and the other must end by itself.

Equal means: every row ever written (also those of steps that were taken again) has the keys, views,
losses, teacher weights, learning rate and digest of all weights that the uninterrupted run has at
that place, and the final state has its digest. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import socket
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH = 4
LENGTHS = {"a": [11, 9], "b": [7, 14]}
# What the runs take in turn.
MODELS: list[dict[str, Any]] = [
    {
        "dropper": {"class_path": "multikd.losses.HardestKept"},
        "balancer": {"class_path": "multikd.losses.DynamicWeightAverage"},
        "normalizers": {"class_path": "multikd.normalizers.EMAStandardizers"},
        "ema_decay": 0.95,
    },
    {
        "dropper": {"class_path": "multikd.losses.RandomTeachers"},
        "balancer": {"class_path": "multikd.losses.InverseLossScale"},
        "normalizers": {
            "class_path": "multikd.normalizers.FixedStandardizers",
            "init_args": {"images": 40},
        },
        "ema_decay": 0.9,
    },
    {
        "balancer": {"class_path": "multikd.losses.UncertaintyWeights"},
        "normalizers": {"class_path": "multikd.normalizers.BatchStandardizers"},
    },
]


@dataclass
class Variant:
    """A layout of processes."""

    world: int
    workers: int
    epochs: int = 3

    def __str__(self) -> str:
        return f"{self.world} process{'es' if self.world > 1 else ''}, {self.workers} workers"


def make_data(root: Path) -> None:
    """Two data sets of little shards, and the weights of two teachers."""
    import numpy as np
    import timm
    import torch
    from PIL import Image

    pixels = np.random.default_rng(0)
    for name, lengths in LENGTHS.items():
        (root / name).mkdir(parents=True)
        number = 0
        for shard, length in enumerate(lengths):
            with tarfile.open(root / name / f"{name}-{shard}.tar", "w") as tar:
                for _ in range(length):
                    buffer = io.BytesIO()
                    image = pixels.integers(0, 256, (28, 28, 3), dtype=np.uint8)
                    Image.fromarray(image).save(buffer, "PNG")
                    info = tarfile.TarInfo(f"{name}{number:03d}.png")
                    info.size = buffer.tell()
                    tar.addfile(info, io.BytesIO(buffer.getvalue()))
                    number += 1
    torch.manual_seed(0)
    for name in ("test_vit", "test_resnet"):
        size: dict[str, Any] = {"img_size": 32} if name == "test_vit" else {}
        model = timm.create_model(name, num_classes=0, **size)
        torch.save(model.state_dict(), root / f"{name}.pth")


def config_of(root: Path, run: Path, variant: Variant, number: int) -> dict[str, Any]:
    """A typed config as a user would write it."""
    teachers = {
        name: {
            "class_path": "multikd.teachers.Teacher",
            "init_args": {
                "encoder": f"timm:{name}",
                "checkpoint": str(root / f"{name}.pth"),
                "resize": "none",
                **({"image_size": 32} if name == "test_vit" else {}),
            },
        }
        for name in ("test_vit", "test_resnet")
    }
    callbacks = [
        {"class_path": "recorder.Recorder", "init_args": {"folder": str(run)}},
        {"class_path": "multikd.callbacks.FiniteLossGuard"},
        {"class_path": "multikd.callbacks.DataFaults"},
        {"class_path": "multikd.callbacks.Throughput"},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {
                "filename": "last",
                "every_n_train_steps": 1 + number % 2,
                "enable_version_counter": False,
            },
        },
    ]
    return {
        "seed_everything": number,
        "trainer": {
            "max_epochs": variant.epochs,
            "accelerator": "cpu",
            "devices": variant.world,
            "strategy": "ddp" if variant.world > 1 else "auto",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accumulate_grad_batches": 1 + (number // 2) % 2,
            "default_root_dir": str(run),
            "log_every_n_steps": 1,
            "callbacks": callbacks,
        },
        "model": {
            "class_path": "multikd.modules.DistillationModule",
            "init_args": {
                "teachers": teachers,
                "student": {
                    "class_path": "multikd.students.StudentEncoder",
                    "init_args": {
                        "name": "test_vit",
                        "image_size": 32,
                        "rungs": "last",
                        "drop_path": 0.2,
                    },
                },
                "projectors": {"class_path": "multikd.projectors.LinearProjectors"},
                "schedule": {"warmup_epochs": 1.0},
                **MODELS[number % len(MODELS)],
            },
        },
        "data": {
            "class_path": "multikd.data.module.ShardDataModule",
            "init_args": {
                "train": {
                    "a": {"urls": str(root / "a"), "weight": 2.0},
                    "b": {"urls": str(root / "b"), "weight": 1.0},
                },
                "train_views": {
                    "class_path": "multikd.data.views.UnicViews",
                    "init_args": {"size": 32},
                },
                "batch_size": BATCH // variant.world,
                "num_workers": variant.workers,
                "seed": number,
            },
        },
    }


def start(config: Path, run: Path, variant: Variant) -> list[int]:
    """Fork the ranks of ``multikd fit --resume auto``; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    sys.stderr.flush()
    pids = []
    for rank in range(variant.world):
        pid = os.fork()
        if pid == 0:
            _child(config, run, variant, rank, port)
        pids.append(pid)
    return pids


def _child(config: Path, run: Path, variant: Variant, rank: int, port: int) -> None:
    """One rank; never returns."""
    code = 70
    try:
        os.setpgid(0, 0)  # so that its workers can be ended with it
        out = os.open(run / f"out.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if variant.world > 1:  # as torchrun would have it
            os.environ.update(
                TORCHELASTIC_RUN_ID="soak",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                WORLD_SIZE=str(variant.world),
                LOCAL_WORLD_SIZE=str(variant.world),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                GROUP_RANK="0",
            )
        from multikd.cli import main

        code = main(["fit", f"--config={config}", "--resume", "auto"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rows_of(run: Path, rank: int) -> list[dict[str, Any]]:
    """Rows that a rank wrote, over all attempts."""
    path = run / f"rows.{rank}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def progress(run: Path, per_epoch: int) -> int:
    """How many batches of the run rank 0 has written at least once."""
    places = [row["at"] for row in rows_of(run, 0) if "at" in row]
    return max((epoch * per_epoch + batch + 1 for epoch, batch in places), default=0)


def finished(pids: list[int], patience: float) -> list[int] | None:
    """Exit codes when all have ended (negative: a signal); None after ``patience`` seconds."""
    codes: dict[int, int] = {}
    end = time.monotonic() + patience
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)  # workers of a killed rank
        if len(codes) < len(pids):
            if time.monotonic() > end:
                return None
            time.sleep(0.005)
    return [codes[pid] for pid in pids]


def end_all(pids: list[int]) -> None:
    """Nothing is left behind."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        for pid in pids:
            os.waitpid(pid, 0)


@dataclass
class Outcome:
    """What a run of one variant came to."""

    kills: int = 0
    repeated: int = 0
    rows: int = 0
    problems: tuple[str, ...] = ()


def run_whole(config: Path, run: Path, variant: Variant) -> None:
    """The uninterrupted run.

    Raises:
        RuntimeError: it failed.
    """
    pids = start(config, run, variant)
    codes = finished(pids, 300.0)
    if codes != [0] * variant.world:
        end_all(pids)
        tail = (run / "out.0.txt").read_text(encoding="utf-8")[-2000:]
        raise RuntimeError(f"the uninterrupted run ended with {codes}:\n{tail}")


def run_killed(
    config: Path, run: Path, variant: Variant, kills: int, batches: int, draw: random.Random
) -> Outcome:
    """The same run, killed ``kills`` times and resumed each time."""
    targets = sorted(draw.sample(range(1, batches), kills))
    per_epoch = batches // variant.epochs
    done, problems = 0, []
    for _ in range(kills + 20):
        pids = start(config, run, variant)
        if done == kills:
            codes = finished(pids, 300.0)
            if codes != [0] * variant.world:
                end_all(pids)
                problems.append(f"the last attempt ended with {codes}")
            break
        end = time.monotonic() + 120.0
        while progress(run, per_epoch) < targets[done] and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.08))
        victim = draw.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim, signal.SIGKILL)
        codes = finished(pids, 60.0)
        if codes is None:
            problems.append("the rank that was left did not end by itself")
            end_all(pids)
        elif codes[pids.index(victim)] != -signal.SIGKILL:
            # It was done before the signal came: its sequence is compared all the same.
            if codes != [0] * variant.world:
                problems.append(f"an attempt ended with {codes}")
            break
        done += 1
    return Outcome(kills=done, problems=tuple(problems))


def compare(whole: Path, run: Path, variant: Variant, outcome: Outcome) -> Outcome:
    """Every row of a killed run against those of the uninterrupted one."""
    problems = list(outcome.problems)
    for rank in range(variant.world):
        reference = {tuple(r["at"]): r for r in rows_of(whole, rank) if "at" in r}
        final = [row["final"] for row in rows_of(whole, rank) if "final" in row]
        seen: list[tuple[int, int]] = []
        for row in rows_of(run, rank):
            if "at" in row:
                at = tuple(row["at"])
                seen.append(at)
                expected = reference.get(at, {})
                other = [key for key in row if row[key] != expected.get(key)]
                if other:
                    problems.append(f"rank {rank}, batch {at}: other {', '.join(other)}")
        if set(seen) != set(reference):
            problems.append(f"rank {rank}: {len(set(reference) - set(seen))} batches are missing")
        if [row["final"] for row in rows_of(run, rank) if "final" in row][-1:] != final:
            problems.append(f"rank {rank}: other final weights")
        outcome.rows += len(seen)
        outcome.repeated += len(seen) - len(set(seen))
    outcome.problems = tuple(problems)
    return outcome


def soak(root: Path, variant: Variant, kills: int, per_run: int, seed: int) -> dict[str, Any]:
    """So many kills of one variant, over as many runs as they need."""
    begun, total, runs = time.monotonic(), Outcome(), 0
    length = sum(sum(lengths) for lengths in LENGTHS.values())
    batches = variant.epochs * (length // BATCH)
    problems: list[str] = []
    while total.kills < kills and runs < 4 * (1 + kills // per_run):
        number = seed + runs
        folders = [root / f"{variant.world}-{variant.workers}-{number}-{n}" for n in ("w", "k")]
        configs = []
        for folder in folders:
            folder.mkdir()
            config = folder / "config.json"
            config.write_text(json.dumps(config_of(root, folder, variant, number)))
            configs.append(config)
        run_whole(configs[0], folders[0], variant)
        wanted = min(per_run, kills - total.kills)
        draw = random.Random(f"{seed}/{variant}/{runs}")
        outcome = run_killed(configs[1], folders[1], variant, wanted, batches, draw)
        outcome = compare(folders[0], folders[1], variant, outcome)
        total.kills += outcome.kills
        total.rows += outcome.rows
        total.repeated += outcome.repeated
        problems += [f"seed {number}: {problem}" for problem in outcome.problems]
        runs += 1
    return {
        "variant": str(variant),
        "runs": runs,
        "kills": total.kills,
        "rows": total.rows,
        "repeated": total.repeated,
        "differences": problems,
        "seconds": round(time.monotonic() - begun, 1),
    }


def side_by_side(
    root: Path, jobs: list[tuple[Variant, int]], per_run: int, seed: int
) -> list[dict[str, Any]]:
    """``soak`` of each (variant, kills), each in a process of its own."""
    drivers = []
    for variant, kills in jobs:
        path = root / f"result-{variant.world}-{variant.workers}.json"
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                path.write_text(json.dumps(soak(root, variant, kills, per_run, seed)))
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        drivers.append((pid, path))
    results = []
    for pid, path in drivers:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            raise RuntimeError(f"a run could not be made (exit code {code}); see above")
        results.append(json.loads(path.read_text(encoding="utf-8")))
        print(results[-1], file=sys.stderr)
    return results


def warm_up(root: Path) -> None:
    """Import what the children need, so that they are forked with it."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    import recorder  # noqa: F401

    import multikd.callbacks
    import multikd.fit
    import multikd.fit_summary  # noqa: F401

    make_data(root)
    # A first run here: what is made at first use is then made before the others are forked.
    run = root / "warm"
    run.mkdir()
    config = config_of(root, run, Variant(1, 0), 0)
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2}
    (run / "config.json").write_text(json.dumps(config))
    from multikd.cli import main as multikd_main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = multikd_main(["fit", f"--config={run / 'config.json'}"])
    if code:
        raise RuntimeError(f"the first run ended with {code}")


def main(argv: list[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=50, help="of the single process (50)")
    parser.add_argument("--kills-ranks", type=int, default=20, help="of two processes (20)")
    parser.add_argument("--per-run", type=int, default=13, help="kills of one run (13)")
    parser.add_argument("--epochs", type=int, default=3, help="of each run (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="keep all files in this new folder")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True)
            root = arguments.keep
        else:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="multikd-soak-")))
        warm_up(root)
        results: list[dict[str, Any]] = []
        for world, kills in ((1, arguments.kills), (2, arguments.kills_ranks)):
            shares = {0: kills - kills // 2, 2: kills // 2}
            jobs = [
                (Variant(world, workers, arguments.epochs), share)
                for workers, share in shares.items()
                if share
            ]
            # Single processes leave a core free: their two variants run side by side.
            for batch in [jobs] if world == 1 else [[job] for job in jobs]:
                results += side_by_side(root, batch, arguments.per_run, arguments.seed)
    print("| layout | runs | kills | rows compared | of them taken again | differences | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['variant']} | {row['runs']} | {row['kills']} | {row['rows']} | "
            f"{row['repeated']} | {len(row['differences'])} | {row['seconds']} |"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(any(row["differences"] for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
