"""``ShardDataModule``: shards under Lightning, for training, validation and feature caches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from multikd import distributed
from multikd.data.balanced import BalancedOrder
from multikd.data.cache import (
    CacheDtype,
    CacheSource,
    CacheStorage,
    FeatureCache,
    FeatureCacheWriter,
)
from multikd.data.cache_storage import Ints
from multikd.data.dataset import RecordedDataset, SampleReader, ShardDataset
from multikd.data.decode import DEFAULT_MAX_PIXELS
from multikd.data.faults import FaultCounter
from multikd.data.loader import ShardLoader, identity
from multikd.data.order import EpochOrder
from multikd.data.remote import RemoteCache, public_name
from multikd.data.resuming import LoaderState
from multikd.data.sampler import GlobalBatchSampler
from multikd.data.schedule import ViewMode, schedule
from multikd.data.sequential import SequentialShards, sequential_urls
from multikd.data.sources import DEFAULT_CACHE, ShardSource
from multikd.data.specs import DatasetSpec, Opened, check_own_views, dataset_facts
from multikd.data.views import EvalViews, UnicViews, ViewPolicy
from multikd.data.workers import Workers, choose_workers, measure_loading, usable_cores
from multikd.types import TokenFeatures

__all__ = ["DatasetSpec", "ShardDataModule"]

logger = logging.getLogger(__name__)


class ShardDataModule(LightningDataModule):
    """Training, validation and bank (support) sets from shards.

    Args:
        train: shards, or a mixture: name → ``DatasetSpec``.
        val: shards to validate on, each sample once; None: no validation.
        bank: labelled support set of the k-NN probe, read like ``val``; None: none.
        train_views: one view policy, or several for several views of each image; None: UNIC's.
        eval_views: of ``val`` and ``bank``; None: resize and centre crop to the training size.
        batch_size: samples per batch on each process.
        eval_batch_size: the same for evaluation; None: ``batch_size``.
        num_workers: loader workers of each process; ``auto`` chooses from the cores and from how
            quickly one of them loads, measured at the start and logged.
        seed: of order and views.
        window_shards: shards whose samples are shuffled together.
        epoch_length: samples in an epoch; None: all (a mixture: the sum of its data sets).
        cache: folder of the feature cache; needs ``train_views`` with ``recorded``.
        cache_dtype: number format that features are kept in.
        cache_storage: the same in detail (int8, PCA, fewer patches), in place of ``cache_dtype``.
        recorded_seed: of recorded views, where runs of several seeds share a cache; None: ``seed``.
        balanced: every global batch holds the same number of each data set of a mixture, in
            proportion to their weights (``balanced.py``).
        view_mode: several ``train_views`` come ``together`` in every step, or ``alternate``.
        view_shares: ``alternate``: how often each comes, relative to each other; None: equally.
        view_images: how many images of a process's batch each view shows; None: all.
        in_memory: decode small sets once and keep the images.
        in_memory_gb: bound of that, per set.
        max_fault_rate: share of unreadable samples past which the run stops.
        max_pixels: larger images are faults.
        allow_truncated: take shards that were cut off up to their last whole sample.
        index_dir: where indexes go that cannot be written beside their shards.
        shard_cache: where remote shards are kept.
        shard_cache_gb: bound of that folder.
        prefetch_factor: batches that each worker prepares ahead.
        persistent_workers: keep workers between epochs.
        worker_start: how workers are started; None: the platform's way.
        sequential: read ``train`` as a plain stream (``pipe:`` sources; see ``sequential.py`` for
            what that cannot promise); ``val`` and ``bank`` stay indexed.
        allow_pipe: let ``pipe:`` sources run their commands.
        epoch_batches: batches of an epoch in the sequential mode.
        shuffle_buffer: samples among which the sequential mode shuffles.

    Validation loaders are ``[val, bank]``, or ``[val]`` without a bank. ``setup`` opens and checks
    everything and raises a ``ValueError`` of one sentence before training begins.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, DatasetSpec],
        val: str | list[str] | None = None,
        bank: str | list[str] | None = None,
        train_views: ViewPolicy | list[ViewPolicy] | None = None,
        eval_views: ViewPolicy | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: Workers = 4,
        seed: int = 0,
        window_shards: int = 16,
        epoch_length: int | None = None,
        cache: str | None = None,
        cache_dtype: CacheDtype = "float16",
        in_memory: bool = False,
        in_memory_gb: float = 2.0,
        max_fault_rate: float = 0.01,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        allow_truncated: bool = False,
        index_dir: str | None = None,
        shard_cache: str | None = None,
        shard_cache_gb: float = 50.0,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        worker_start: Literal["fork", "forkserver", "spawn"] | None = None,
        sequential: bool = False,
        allow_pipe: bool = False,
        epoch_batches: int | None = None,
        shuffle_buffer: int = 1000,
        cache_storage: CacheStorage | None = None,
        recorded_seed: int | None = None,
        balanced: bool = False,
        view_mode: ViewMode = "together",
        view_shares: list[float] | None = None,
        view_images: list[int | None] | None = None,
    ) -> None:
        super().__init__()
        if train_views is None:
            train_views = UnicViews()
        self.train_views = [train_views] if isinstance(train_views, ViewPolicy) else train_views
        if not self.train_views:
            raise ValueError("train_views must be at least one view policy, received an empty list")
        self.balanced = balanced
        self.view_mode = view_mode
        self.schedule = schedule(len(self.train_views), view_mode, view_shares, view_images)
        self.eval_views = eval_views or EvalViews(self.train_views[0].size)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self._auto_workers = num_workers == "auto"
        self._measured = False
        self.num_workers = 0 if num_workers == "auto" else num_workers
        self.seed = seed
        self.window_shards = window_shards
        self.epoch_length = epoch_length
        self.cache = cache
        self.cache_storage = cache_storage or CacheStorage(cache_dtype)
        self.recorded_seed = seed if recorded_seed is None else recorded_seed
        self.in_memory_bytes = in_memory_gb * 1e9 if in_memory else None
        self.max_fault_rate = max_fault_rate
        self.max_pixels = max_pixels
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.worker_start = worker_start
        self.sequential = sequential
        self.allow_pipe = allow_pipe
        self.epoch_batches = epoch_batches
        self.shuffle_buffer = shuffle_buffer
        self._specs = {"train": train, "val": val, "bank": bank}
        self._source_settings: dict[str, Any] = {
            "index_dir": index_dir,
            "cache_dir": shard_cache,
            "cache_gb": shard_cache_gb,
            "allow_truncated": allow_truncated,
        }
        self._opened: dict[str, Opened] = {}
        self._loaders: list[ShardLoader] = []
        self._fingerprints: dict[str, str] | None = None
        self._train_loader: ShardLoader | None = None
        self.resumed: LoaderState | None = None
        self.allow_other_order = False
        self._check_settings()

    # --- checking and opening -----------------------------------------------------------------

    def _check_settings(self) -> None:
        if self.num_workers < 0 or self.prefetch_factor < 1:
            raise ValueError(
                "num_workers must be at least 0 and prefetch_factor at least 1, received "
                f"{self.num_workers} and {self.prefetch_factor}"
            )
        FaultCounter(self.max_fault_rate)  # raises on a bad rate
        if any(policy.recorded is not None for policy in self.train_views[1:]):
            raise ValueError("only the first of several train_views can have recorded views")
        recorded = self.train_views[0].recorded is not None
        if self.cache is not None and not recorded:
            raise ValueError(
                "a feature cache needs views that come back: set recorded (for instance 4) in "
                "train_views"
            )
        own = {name: spec.policies() for name, spec in self.mixture().items()}
        check_own_views(self.train_views, {name: v for name, v in own.items() if v is not None})
        if self.balanced and len(own) < 2:
            raise ValueError(
                "balanced batches hold two or more data sets: set data.train to a mixture "
                "{name: {urls: …}, …}, or balanced to false"
            )
        if self.sequential and self.schedule.settings():
            raise ValueError(
                "the sequential mode shows all views of every image: leave view_mode and "
                "view_images out, or set sequential to false"
            )
        if self.sequential:
            if self.epoch_batches is None:
                raise ValueError(
                    "the sequential mode does not know how long an epoch is: set epoch_batches"
                )
            if recorded or self._specs["train"] is None or isinstance(self._specs["train"], dict):
                raise ValueError(
                    "recorded views, feature caches and mixtures need the indexed mode: set "
                    "sequential to false, or leave them out"
                )

    def mixture(self) -> dict[str, DatasetSpec]:
        """The data sets of a training mixture by name; empty for a list of shards."""
        train = self._specs["train"]
        return dict(train) if isinstance(train, dict) else {}

    def all_views(self) -> list[ViewPolicy]:
        """Every policy that training uses: ``train_views``, and those of single data sets."""
        own = [view for spec in self.mixture().values() for view in spec.policies() or []]
        return [*self.train_views, *own]

    def has(self, role: str) -> bool:
        """Whether shards were given for ``train``, ``val`` or ``bank``."""
        return self._specs[role] is not None

    def setup(self, stage: str | None = None) -> None:
        """Open and check the data sets that a stage needs (None: all).

        Raises:
            ValueError: no shard matched, a shard is empty or truncated, or the training set is
                smaller than one global batch.
        """
        roles = ("train", "val", "bank") if stage in (None, "fit") else ("val", "bank")
        for role in roles:
            if role == "train" and self.sequential:
                self._sequential().check_workers(self.num_workers)
            elif self._specs[role] is not None:
                self._open(role)
        if "train" in roles and not self.sequential:
            self._train_sampler(*self._ranks())

    def _open(self, role: str) -> Opened:
        if role in self._opened:
            return self._opened[role]
        spec = self._specs[role]
        if spec is None:
            raise ValueError(f"this data module has no {role} shards: set {role}")
        specs = spec if isinstance(spec, dict) else {role: DatasetSpec(spec)}
        if not specs:
            raise ValueError(f"{role} must name at least one data set, received an empty mixture")
        opened = Opened(
            tuple(specs),
            tuple(one.weight for one in specs.values()),
            SampleReader(
                [ShardSource(one.urls, **self._source_settings) for one in specs.values()],
                self.max_pixels,
                keep=self.in_memory_bytes is not None,
            ),
        )
        for name, samples in zip(opened.names, opened.samples, strict=True):
            if samples == 0:
                raise ValueError(f"the {role} data set {name!r} has no samples: check its shards")
        self._opened[role] = opened
        self._warn_of_small_cache(opened)
        return opened

    def _warn_of_small_cache(self, opened: Opened) -> None:
        """Say when a window of remote shards is larger than the cache they are kept in."""
        window = 0
        for source in opened.reader.sources:
            largest = sorted(range(len(source.urls)), key=lambda s: -source.indexes[s].size)
            window += source.remote_bytes(largest[: self.window_shards])
        bound = self._source_settings["cache_gb"] * 1e9
        if window > bound:
            logger.warning(
                "window_shards=%d shards take up to %.1f GB and the cache of remote shards holds "
                "%.1f GB, so that they are fetched again and again: raise shard_cache_gb or lower "
                "window_shards",
                self.window_shards,
                window / 1e9,
                bound / 1e9,
            )

    def _ranks(self) -> tuple[int, int]:
        """(rank, world): the process group's, else the trainer's, else one process."""
        if distributed.is_distributed():
            return distributed.rank(), distributed.world_size()
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return 0, 1

    # --- training -----------------------------------------------------------------------------

    def train_order(self) -> EpochOrder:
        """The order of the training samples."""
        train = self._open("train")
        rest = (self.seed, self.window_shards, self.epoch_length)
        if self.balanced:
            batch = self.batch_size * self._ranks()[1]
            return BalancedOrder(train.lengths, train.weights, batch, train.names, *rest)
        return EpochOrder(train.lengths, train.weights, *rest)

    def _train_sampler(self, rank: int, world: int) -> GlobalBatchSampler:
        return GlobalBatchSampler(self.train_order().length, self.batch_size, rank, world)

    def steps_per_epoch(self, world: int = 1) -> int:
        """Batches of an epoch on each of ``world`` processes."""
        if self.sequential:
            return self.epoch_batches or 0
        return len(self._train_sampler(0, world))

    def train_dataloader(self) -> ShardLoader:
        """This rank's training batches; with a cache they carry the teachers' features."""
        if self.sequential:
            dataset = self._sequential()
            dataset.check_workers(self.num_workers)
            # Workers get the epoch with the data set when they start, so they start every epoch.
            self._train_loader = self._loader(dataset, dataset, persistent=False)
        else:
            train = self._open("train")
            shards = ShardDataset(
                self._read_ready(train),
                self.train_order(),
                self.train_views,
                self.seed,
                self._cached(),
                self.recorded_seed,
                self.schedule,
                self._own_views(),
            )
            shards.grey_for_lost = self._ranks()[1] > 1
            sampler = self._train_sampler(*self._ranks())
            sampler.numbered = self.schedule.mode == "alternate"
            self._train_loader = self._loader(shards, sampler, train=True)
        if self.resumed is not None:
            self._go_on(self.resumed)
        return self._train_loader

    def _own_views(self) -> dict[int, list[ViewPolicy]]:
        policies = [spec.policies() for spec in self.mixture().values()]
        return {place: views for place, views in enumerate(policies) if views is not None}

    # --- going on inside an epoch -------------------------------------------------------------

    def order_identity(self) -> dict[str, str]:
        """What the order of training samples is a function of, with a fingerprint of the shards."""
        identity = {"seed": str(self.seed), "sequential": str(self.sequential)}
        if self.sequential:
            spec = self._specs["train"]
            listed = sequential_urls(spec if isinstance(spec, (str, list)) else [], self.allow_pipe)
            text = "\n".join([*map(public_name, listed), str(self.shuffle_buffer)])
            return identity | {"shards": hashlib.sha256(text.encode()).hexdigest()[:16]}
        train, order = self._open("train"), self.train_order()
        if isinstance(order, BalancedOrder):
            identity["balanced"] = ",".join(map(str, order.counts))
        identity |= self.schedule.settings()
        digest = hashlib.sha256()
        for source in train.reader.sources:
            digest.update(source.fingerprint().encode())
        return identity | {
            "shards": digest.hexdigest()[:16],
            "samples": str(sum(order.totals)),
            "quotas": ",".join(map(str, order.quotas)),
            "window_shards": str(self.window_shards),
        }

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data (``LoaderState``), from what the loop has consumed.

        From the loop, not from the loader: what workers prefetched has not been seen.
        """
        trainer, loader = self.trainer, self._train_loader
        if trainer is None or loader is None:
            return {}
        epochs: Any = trainer.fit_loop.epoch_progress.current
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = batches.processed
        if epochs.processed >= epochs.started:
            done = 0  # between two epochs
        world = self._ranks()[1]
        sampler = loader.places
        if isinstance(sampler, GlobalBatchSampler):
            position, stop = sampler.consumed(done), sampler.stop(int(trainer.num_training_batches))
        else:
            position, stop = (n * self.batch_size * world for n in (done, len(loader)))
        return LoaderState(
            epoch=epochs.processed,
            batches=done,
            position=position,
            stop=stop,
            batch_size=self.batch_size,
            world=world,
            accumulate=trainer.accumulate_grad_batches,
            order=self.order_identity(),
        ).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the place up again; see ``check_resumed`` for what is refused."""
        self.resumed = LoaderState.from_state_dict(state_dict)
        if self.resumed is not None and self._train_loader is not None:
            self._go_on(self.resumed)

    def check_resumed(self, state: LoaderState) -> None:
        """Refuse to go on inside an epoch whose rest can't be had.

        Raises:
            ValueError: other shards or another order, without ``allow_other_order``; another
                number of processes in the sequential mode, or with ``limit_train_batches``.
        """
        changed = state.other_order(self.order_identity())
        if changed and state.inside and not self.allow_other_order:
            raise ValueError(
                f"the checkpoint lies inside epoch {state.epoch}, at sample {state.position} of "
                f"{state.stop}, of other training data ({'; '.join(changed)}): what is left of the "
                "epoch can't be known; give the shards and settings it was made with, or add "
                "--allow_changes to go on in the new order from that place"
            )
        if changed:
            logger.warning("the training data is not the checkpoint's: %s", "; ".join(changed))
        world = self._ranks()[1]
        same_batch = self.batch_size * world == state.batch_size * state.world
        if not state.inside or (same_batch and not (self.sequential and world != state.world)):
            return
        limit = 1.0 if self.trainer is None else self.trainer.limit_train_batches
        if self.sequential or limit != 1.0:
            raise ValueError(
                f"the checkpoint was made by {state.world} processes with batches of "
                f"{state.batch_size}, and here they are {world} with {self.batch_size}: "
                + (
                    "a plain stream (data.sequential) depends on their number"
                    if self.sequential
                    else "with trainer.limit_train_batches an epoch can't go on in another layout"
                )
                + "; use as many, or a checkpoint from the end of an epoch"
            )

    def batches_before(self, state: LoaderState) -> int:
        """The number of the first batch to come of the epoch in ``state``, in batches of ours."""
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return state.batches_before(self.batch_size, self._ranks()[1], accumulate)

    def _go_on(self, state: LoaderState) -> None:
        """Let the training loader begin where ``state`` says."""
        loader = self._train_loader
        if loader is None or not state.inside:
            return
        self.check_resumed(state)
        sampler = loader.places
        if not isinstance(sampler, GlobalBatchSampler):
            logger.info("reading %d batches again: a plain stream has no places", state.batches)
            sampler.set_epoch(state.epoch)
            loader.skip(state.batches)
            return
        epoch = 0 if loader.fixed_epoch else state.epoch
        length = self.train_order().length
        if max(state.position, state.stop) > length:  # fewer samples than there were
            whole = sampler.whole
            sampler.resume(epoch, min(self.batches_before(state), whole))
            return
        sampler.resume(epoch, self.batches_before(state), state.position, state.stop)

    def _sequential(self) -> SequentialShards:
        spec = self._specs["train"]
        if spec is None or isinstance(spec, dict):
            raise ValueError("the sequential mode reads one list of shards: set train to it")
        settings = self._source_settings
        folder = Path(settings["cache_dir"]) if settings["cache_dir"] else DEFAULT_CACHE / "shards"
        rank, world = self._ranks()
        return SequentialShards(
            sequential_urls(spec, self.allow_pipe),
            self.train_views,
            self.batch_size,
            self.epoch_batches or 0,
            remote=RemoteCache(folder, int(settings["cache_gb"] * 1e9)),
            rank=rank,
            world=world,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            max_pixels=self.max_pixels,
        )

    # --- evaluation ---------------------------------------------------------------------------

    def val_dataloader(self) -> list[ShardLoader]:
        """``[val, bank]`` (those that were given): each sample once, in file order.

        Every rank has equally many batches; places that only pad them have position −1.
        """
        return [self.eval_dataloader(r) for r in ("val", "bank") if self._specs[r] is not None]

    def test_dataloader(self) -> list[ShardLoader]:
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ShardLoader:
        """The validation set: the shards whose features are asked for."""
        return self.eval_dataloader("val")

    def eval_dataloader(self, role: Literal["train", "val", "bank"] | str) -> ShardLoader:
        """One of the sets with the evaluation views, in file order."""
        opened = self._open(role)
        order = EpochOrder(opened.lengths, seed=self.seed, shuffle=False)
        dataset = ShardDataset(self._read_ready(opened), order, [self.eval_views], self.seed)
        rank, world = self._ranks()
        dataset.grey_for_lost = world > 1
        sampler = GlobalBatchSampler(
            order.length, self.eval_batch_size, rank, world, drop_last=False
        )
        return self._loader(dataset, sampler)

    # --- feature cache ------------------------------------------------------------------------

    def cache_source(self) -> CacheSource:
        """What the cached features depend on besides the teachers."""
        train, policy = self._open("train"), self.train_views[0]
        if policy.recorded is None:
            raise ValueError("cached features need recorded views: set recorded in train_views")
        digest = hashlib.sha256()
        for source in train.reader.sources:
            digest.update(source.fingerprint().encode())
        return CacheSource(
            digest.hexdigest(),
            train.samples,
            policy.recorded,
            policy.describe(),
            self.recorded_seed,
        )

    def _cache_folder(self) -> str:
        if self.cache is None:
            raise ValueError("this data module has no feature cache: set cache to a folder")
        return self.cache

    def cache_complete(self, fingerprints: Mapping[str, str], verify: bool = False) -> bool:
        """Whether the cache has every row of these teachers (name → fingerprint).

        With ``verify`` all of it is read: files that were cut off, and rows that do not fit their
        checksum, are said and count as missing. Whatever the answer, ``train_dataloader`` serves
        these teachers from the cache from now on.

        Raises:
            ValueError: the cache was made from other data, views or teachers; names what differs.
        """
        self._fingerprints = dict(fingerprints)
        try:
            cache = FeatureCache(self._cache_folder(), self.cache_source())
        except FileNotFoundError:
            return False
        present = {n: f for n, f in fingerprints.items() if n in cache.records}
        cache.check(present)
        if len(present) < len(fingerprints):
            return False
        if not verify:
            return not len(cache.missing(list(fingerprints)))
        try:
            missing, wrong = cache.missing(list(present)), cache.damaged_chunks(list(present))
        except ValueError as error:
            logger.warning("%s", error)
            return False
        for name, chunks in wrong.items():
            first, end = cache.rows_in(name, chunks[0])
            logger.warning(
                "%d chunks of teacher %r in the feature cache %s do not fit their checksum (the "
                "first: rows %d to %d): they are computed again",
                len(chunks), name, self.cache, first, end - 1,
            )  # fmt: skip
        return not len(missing) and not wrong

    def cached_teachers(self) -> tuple[str, ...]:
        """Teachers that the cache has features of, finished or not; none without a cache."""
        try:
            return tuple(FeatureCache(self._cache_folder(), self.cache_source()).records)
        except FileNotFoundError:
            return ()

    def open_cache_writer(
        self,
        specs: Mapping[str, tuple[str, TokenFeatures]],
        about: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> FeatureCacheWriter:
        """Create or continue the cache for teachers: name → (fingerprint, example features)."""
        self._fingerprints = {name: fingerprint for name, (fingerprint, _) in specs.items()}
        return FeatureCacheWriter(
            self._cache_folder(), self.cache_source(), specs, self.cache_storage, about
        )

    def example_dataloader(self, count: int) -> ShardLoader:
        """Batches of ``count`` recorded views spread evenly over all of them, alike on all ranks.

        What scales and bases of a cache are measured on.
        """
        source = self.cache_source()
        count = min(count, source.rows)
        rows = np.linspace(0, source.rows - 1, count).round().astype(np.int64)
        return self._recorded_loader(source, rows, 0, 1)

    def precompute_dataloader(
        self, rank: int | None = None, world: int | None = None
    ) -> ShardLoader | None:
        """Batches of the recorded views that the cache still lacks; None when it lacks none.

        Call it after ``open_cache_writer``, on every rank before any of them writes (a barrier
        between the two): the ranks share the rows that are missing now.
        """
        here = self._ranks()
        rank, world = here[0] if rank is None else rank, here[1] if world is None else world
        cache = FeatureCache(self._cache_folder(), self.cache_source())
        rows = cache.missing(list(self._fingerprints or cache.records))
        if not len(rows):
            return None
        return self._recorded_loader(cache.source, rows, rank, world)

    def _recorded_loader(
        self, source: CacheSource, rows: Ints, rank: int, world: int
    ) -> ShardLoader:
        train = self._open("train")
        dataset = RecordedDataset(
            self._read_ready(train), self.train_views[0], source, rows, self.recorded_seed
        )
        sampler = GlobalBatchSampler(len(rows), self.eval_batch_size, rank, world, drop_last=False)
        return self._loader(dataset, sampler, persistent=False)

    def _cached(self) -> tuple[FeatureCache, tuple[str, ...]] | None:
        if self.cache is None or self._fingerprints is None:
            return None
        if not self.cache_complete(self._fingerprints):
            raise ValueError(
                f"the feature cache {self.cache} is not complete for the teachers "
                f"{sorted(self._fingerprints)}: compute the missing features first"
            )
        return FeatureCache(self.cache, self.cache_source()), tuple(self._fingerprints)

    # --- what others ask ----------------------------------------------------------------------

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, from the ``dataset.json`` beside local shards; None without."""
        for role in ("val", "bank", "train"):
            if self._specs[role] is None or (role == "train" and self.sequential):
                continue
            for source in self._open(role).reader.sources:
                found = dataset_facts(source.urls[0]).get("classes")
                if found:
                    return [str(name) for name in found]
        return None

    def describe(self) -> dict[str, Any]:
        """Samples, shards, share and index faults of every set, as JSON values."""
        sets: dict[str, Any] = {}
        for role, spec in self._specs.items():
            if spec is None or (role == "train" and self.sequential):
                continue
            opened = self._open(role)
            total = sum(opened.weights)
            sets[role] = {
                name: {
                    "samples": len(source),
                    "shards": len(source.urls),
                    "share": weight / total,
                    "faults": source.faults,
                }
                for name, weight, source in zip(
                    opened.names, opened.weights, opened.reader.sources, strict=True
                )
            }
        return {
            "sets": sets,
            "classes": None if (names := self.classes) is None else len(names),
            "views": [policy.describe() for policy in self.train_views],
            "batch_size": self.batch_size,
        }

    def teardown(self, stage: str | None = None) -> None:
        """Stop workers and close shards."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()
        self._train_loader = None
        for opened in self._opened.values():
            for source in opened.reader.sources:
                source.close()

    # --- loaders ------------------------------------------------------------------------------

    def _choose_workers(self, dataset: ShardDataset | SequentialShards) -> None:
        """``num_workers: auto``, once, at the first loader."""
        self._measured = True
        if not isinstance(dataset, ShardDataset):
            logger.info("num_workers=auto: a plain stream is not measured; no workers")
            return
        count = min(len(dataset), 64)
        trainer = self.trainer
        here = 1 if trainer is None else trainer.num_devices
        on_cpu = trainer is None or trainer.strategy.root_device.type == "cpu"
        seconds = measure_loading(lambda n: dataset[(0, n)], count)
        self.num_workers = choose_workers(seconds, self.batch_size, usable_cores(), here, on_cpu)

    def _read_ready(self, opened: Opened) -> SampleReader:
        if self.in_memory_bytes is not None:
            opened.reader.preload(self.in_memory_bytes)
        return opened.reader

    def _loader(
        self,
        dataset: ShardDataset | SequentialShards,
        sampler: GlobalBatchSampler | SequentialShards,
        train: bool = False,
        persistent: bool = True,
    ) -> ShardLoader:
        if self._auto_workers and not self._measured:
            self._choose_workers(dataset)
        workers = self.num_workers
        settings: dict[str, Any] = {
            "num_workers": workers,
            "collate_fn": identity,
            "pin_memory": torch.cuda.is_available(),
            # DataLoader draws a seed for its workers, how often depends on their number: from
            # torch's global generator that would change the student's dropout.
            "generator": torch.Generator(),
        }
        if workers:
            settings["prefetch_factor"] = self.prefetch_factor
            settings["persistent_workers"] = self.persistent_workers and persistent
            settings["multiprocessing_context"] = self.worker_start
        if isinstance(sampler, SequentialShards):
            settings["batch_size"] = None
        else:
            settings["batch_sampler"] = sampler
        overfit = train and getattr(self.trainer, "overfit_batches", 0) > 0
        loader = ShardLoader(
            DataLoader(dataset, **settings), sampler, FaultCounter(self.max_fault_rate), overfit
        )
        self._loaders.append(loader)
        return loader
