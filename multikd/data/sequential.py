"""Shards as a plain stream: for ``pipe:`` sources and archives that cannot be indexed.

What this mode cannot promise, beside the indexed one:

- The order depends on the number of ranks and workers: each worker streams its own shards. It is
  the same again for the same (seed, epoch, ranks, workers).
- Shards that can't be read any more end a run of one process at once. Of several ranks the one that
  found them gives grey batches, which carry no loss, until ``DataFaults`` stops all of them.
- A sample is not seen exactly once an epoch: an epoch is ``epoch_batches`` batches on every rank,
  and a worker begins its shards again when they are used up.
- Resuming inside an epoch means reading up to that place.
- Shuffling is a buffer of samples, not a permutation. ``samples`` are −1, so features cannot be
  cached; a faulty sample is skipped and the next one takes its place.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from multikd.data.counters import Stream, permutation
from multikd.data.dataset import NO_STAND_IN, Sample, decode_members
from multikd.data.decode import DEFAULT_MAX_PIXELS, SampleFault
from multikd.data.remote import RemoteCache, is_remote, public_name
from multikd.data.sampler import FILLER
from multikd.data.soft_labels import stack_soft
from multikd.data.sources import expand_urls
from multikd.data.tar import stream_members
from multikd.data.views import DrawKey, ViewPolicy
from multikd.redaction import redact
from multikd.types import Batch, Fault


def sequential_urls(spec: str | Sequence[str], allow_pipe: bool = False) -> list[str]:
    """The shards of a stream: what ``expand_urls`` takes, and ``pipe:COMMAND``.

    Raises:
        ValueError: a ``pipe:`` source without ``allow_pipe``; nothing matched.
    """
    urls: list[str] = []
    for part in [spec] if isinstance(spec, str) else spec:
        if not part.startswith("pipe:"):
            urls += expand_urls(part)
            continue
        if not allow_pipe:
            raise ValueError(
                f"{redact(part)!r} runs a shell command of whoever wrote this configuration: "
                "set allow_pipe, by --data.allow_pipe=true on the command line, if you trust it"
            )
        urls.append(part)
    return urls


class SequentialShards(IterableDataset[Batch]):
    """Batches from shards read front to back, grouped by webdataset's own stage.

    None of webdataset's decoders (one of them unpickles), none of its remote openers and not its
    tar stage (which allocates what a header promises) is used: images and labels are decoded as in
    the indexed mode, http(s) goes through the local cache.

    Args:
        urls: from ``sequential_urls``.
        policies: one or several views, drawn anew each epoch.
        batch_size: samples per batch.
        epoch_batches: batches of an epoch on every rank.
        rank, world: this process and how many there are.
        seed: of shard order, shuffling and views.
        shuffle_buffer: samples among which is shuffled; 0 keeps the shards' order.
        max_pixels: larger images are faults.
        remote: where http(s) shards are kept.

    Raises:
        ValueError: fewer shards than ranks, or (when iterated) than ranks × workers.
    """

    def __init__(
        self,
        urls: Sequence[str],
        policies: Sequence[ViewPolicy],
        batch_size: int,
        epoch_batches: int,
        *,
        remote: RemoteCache,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        if batch_size < 1 or epoch_batches < 1:
            raise ValueError(
                "batch_size and epoch_batches must be at least 1, received "
                f"{batch_size} and {epoch_batches}"
            )
        self.urls = list(urls)
        self.policies = tuple(policies)
        self.batch_size = batch_size
        self.epoch_batches = epoch_batches
        self.rank, self.world = rank, world
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.max_pixels = max_pixels
        self.epoch = 0
        self._remote = remote
        self.check_workers(1)

    @property
    def sampler(self) -> SequentialShards:
        """Itself, for Lightning's ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch_batches

    def check_workers(self, workers: int) -> None:
        """Refuse a layout in which some worker would have no shard."""
        workers = max(1, workers)
        if len(self.urls) < self.world * workers:
            raise ValueError(
                f"the sequential mode needs a shard for each worker of each rank, received "
                f"{len(self.urls)} shards for {self.world} ranks × {workers} workers: use fewer "
                "workers, or more shards, or the indexed mode, which has no such limit"
            )

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        self.check_workers(workers)
        samples = self._samples(worker, workers)
        # The loader takes batches from its workers in turn, so worker w gives w, w + workers, ….
        lost: ValueError | None = None
        for number in range(worker, self.epoch_batches, workers):
            if lost is None:
                try:
                    batch = self._batch(number, samples)
                except ValueError as error:
                    if self.world == 1:
                        raise
                    # One that raised alone would hang the others.
                    lost, batch = error, self._grey()
                    batch.faults.append(Fault(NO_STAND_IN, "", batch.keys[0], str(error)))
                yield batch
            else:
                yield self._grey()

    def _samples(self, worker: int, workers: int) -> Iterator[tuple[str, dict[str, bytes], str]]:
        """(key, members, shard) of this worker's shards, over and over."""
        from webdataset import filters

        shards = np.arange(len(self.urls))
        if self.shuffle_buffer:
            shards = permutation(len(shards), self.seed, Stream.SHARDS, self.epoch)
        mine = shards[self.rank :: self.world][worker::workers]
        turn = 0
        while True:
            order = mine
            if self.shuffle_buffer and turn:  # again, in another order; still only its own
                place = worker * self.world + self.rank + 1
                order = mine[
                    permutation(len(mine), self.seed, Stream.SHARDS, self.epoch, place, turn)
                ]
            stream = self._grouped(order.tolist())
            if self.shuffle_buffer:
                text = f"{self.seed}/{self.epoch}/{turn}/{self.rank}/{worker}"
                shuffle = filters.shuffle(
                    self.shuffle_buffer, initial=self.shuffle_buffer, rng=random.Random(text)
                )
                stream = shuffle(stream)
            count = 0
            for sample in stream:
                count += 1
                members = {k: v for k, v in sample.items() if not k.startswith("__")}
                yield sample["__key__"], members, public_name(sample["__url__"])
            if count == 0:
                names = ", ".join(public_name(self.urls[i]) for i in mine.tolist()[:3])
                raise ValueError(f"the shards {names} gave no samples: check the command or path")
            turn += 1

    def _grouped(self, numbers: list[int]) -> Iterator[dict[str, Any]]:
        """Samples of these shards by webdataset's own stages; errors are not passed over."""
        from webdataset.tariterators import group_by_keys

        for number, following in zip(numbers, [*numbers[1:], -1], strict=True):
            self._fetch_ahead(following)
            try:
                yield from group_by_keys(self._members(self.urls[number]))
            except Exception as error:  # hostile bytes make tarfile raise nearly anything
                words = error.args[0] if error.args else error
                raise ValueError(
                    f"cannot read the shard {public_name(self.urls[number])} as a stream "
                    f"({type(error).__name__}: {words}): check the command or the file"
                ) from error

    def _fetch_ahead(self, number: int) -> None:
        """Start fetching a shard, if it is remote; a failure is left to whoever reads it."""
        if number < 0 or not is_remote(self.urls[number]):
            return

        def fetch() -> None:
            with contextlib.suppress(OSError):
                self._remote.fetch(self.urls[number])

        threading.Thread(target=fetch, daemon=True).start()

    def _members(self, url: str) -> Iterator[dict[str, Any]]:
        for opened in self._open(url):
            for name, data in stream_members(opened["stream"]):
                yield {"fname": name, "data": data, "__url__": url}

    def _open(self, url: str) -> Iterator[dict[str, Any]]:
        from webdataset.gopen import gopen_pipe

        if not url.startswith("pipe:"):
            path = self._remote.fetch(url) if is_remote(url) else Path(url)
            with path.open("rb") as file:
                yield {"url": url, "stream": file}
            return
        pipe = gopen_pipe(url)
        try:
            yield {"url": url, "stream": pipe}
        except GeneratorExit:
            pipe.ignore_errors = True  # left in the middle: how the command ends says nothing
            raise
        finally:
            pipe.close()

    def _grey(self) -> Batch:
        """A batch that only keeps the ranks in step."""
        count, views = self.batch_size, len(self.policies)
        none = torch.full((count,), -1, dtype=torch.int64)
        size = max(len(policy.names) for policy in self.policies)
        return Batch(
            views=[
                torch.full((count, 3, policy.size, policy.size), 128, dtype=torch.uint8)
                for policy in self.policies
            ],
            labels=none,
            keys=["nothing"] * count,
            dataset=torch.zeros(count, dtype=torch.int64),
            positions=torch.full((count,), FILLER, dtype=torch.int64),
            samples=none.clone(),
            view_parameters=torch.zeros(count, views, size),
            recorded=none.clone(),
        )

    def _batch(self, number: int, samples: Iterator[tuple[str, dict[str, bytes], str]]) -> Batch:
        first = (number * self.world + self.rank) * self.batch_size
        rows: list[Sample] = []
        faults: list[Fault] = []
        while len(rows) < self.batch_size:
            key, members, shard = next(samples)
            try:
                rows.append(decode_members(members, key, self.max_pixels))
            except SampleFault as fault:
                faults.append(Fault(fault.cause, shard, key, fault.detail))
                if len(faults) > 16 + self.batch_size:
                    raise ValueError(
                        f"{len(faults)} samples of one batch cannot be read (the last: {key} of "
                        f"{shard}: {fault.cause}, {fault.detail}): check the shards"
                    ) from fault
        size = max(len(policy.names) for policy in self.policies)
        parameters = np.zeros((len(rows), len(self.policies), size), dtype=np.float32)
        views: list[list[torch.Tensor]] = [[] for _ in self.policies]
        for row, sample in enumerate(rows):
            for view, policy in enumerate(self.policies):
                drawn = policy.draw(
                    DrawKey.live(self.seed, self.epoch, first + row, view), sample.size
                )
                parameters[row, view, : len(drawn)] = drawn
                views[view].append(policy.see(sample.pixels, drawn))
        count = len(rows)
        return Batch(
            views=[torch.stack(images) for images in views],
            labels=torch.tensor([sample.label for sample in rows], dtype=torch.int64),
            soft_labels=stack_soft([s.soft for s in rows], [s.label for s in rows]),
            keys=[sample.key for sample in rows],
            dataset=torch.zeros(count, dtype=torch.int64),
            positions=torch.arange(first, first + count),
            samples=torch.full((count,), -1, dtype=torch.int64),
            view_parameters=torch.from_numpy(parameters),
            recorded=torch.full((count,), -1, dtype=torch.int64),
            faults=faults,
        )
