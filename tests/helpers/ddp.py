"""Run a function on several gloo ranks and bring back what each returned.

Ranks are forked from a server process that has imported torch once, so that a run costs tenths of
a second after the first. ``fn`` must be importable (a module-level function of a test module).
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


def run_ranks(
    fn: Callable[..., Any], world: int = 2, *args: Any, timeout: float = 120.0
) -> list[Any]:
    """``[fn(*args) on rank 0, …]``, each inside an initialised gloo process group.

    ``fn`` learns its rank from ``torch.distributed``. Arguments and results are pickled.

    Raises:
        RuntimeError: with the traceback of the first rank that failed, or when ``timeout`` seconds
            pass. No process is left behind in either case.
    """
    context = multiprocessing.get_context("forkserver")
    # Imported once by the server and shared by all ranks, which otherwise take ten seconds each.
    context.set_forkserver_preload(
        ["torch.distributed", "multikd.callbacks", "multikd.data.module"]
    )
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        pipes: list[Connection] = []
        processes = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(fn, rank, world, store, timeout, theirs, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        patience = 0.0
        try:
            results = _collect(pipes, timeout)
            patience = 10.0  # all have spoken: let them leave by themselves
            return results
        finally:
            for process in processes:
                process.join(timeout=patience)
                if process.is_alive():
                    process.kill()
                    process.join()
                process.close()
            for pipe in pipes:
                pipe.close()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while len(results) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks still running after {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    store: str,
    timeout: float,
    pipe: Connection,
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        result = fn(*args)
        # Plain pickle copies tensors; a multiprocessing queue would share memory that dies with us.
        message = pickle.dumps((True, result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)
    pipe.close()
