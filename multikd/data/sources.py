"""Samples of a list of shards, read by (shard, sample), in any order, by byte range."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

from multikd.data.decode import SampleFault
from multikd.data.index import (
    INDEX_SUFFIX,
    Member,
    ShardIndex,
    build_index,
    index_path,
    read_index,
    truncated_message,
    without_mtime,
)
from multikd.data.remote import RemoteCache, RemoteError, is_remote, public_name
from multikd.data.urls import expand_braces, expand_urls
from multikd.files import write_atomically

__all__ = ["DEFAULT_CACHE", "ShardSource", "expand_braces", "expand_urls"]

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path.home() / ".cache" / "multikd"
_COOL_DOWN = 60.0  # seconds for which a shard that could not be fetched is not asked for again
_MOST_MEMBERS = 1 << 30  # bytes of one sample: more would be allocated before its header is seen
_GAP = 1 << 16  # bytes between two members that are read along rather than skipped


class ShardSource:
    """The samples of a list of shards, read by (shard, sample), local or over http(s).

    Making one reads every shard's index (and makes it where there is none: a remote shard without
    ``<shard>.index.npz`` beside it is fetched for that). The object may be pickled or forked into
    loader workers: file handles are each process's own.

    Args:
        spec: what ``expand_urls`` takes.
        index_dir: where indexes go that cannot be written beside their shards.
        cache_dir: where remote shards are kept.
        cache_gb: bound of that cache, in 10⁹ bytes.
        allow_truncated: take shards that were cut off, up to their last whole sample.
        open_files: file handles held open per process.
        timeout, retries: of each request.
        progress: called with (shards indexed, shards) while indexes are read.

    Raises:
        ValueError: no shard matched, or a shard is missing, empty, truncated, compressed, or not
            a tar; the message names it.
        RemoteError: an address could not be fetched.
    """

    _fetcher: threading.Thread | None
    _handles: OrderedDict[int, int]  # shard → file descriptor, least recently used first
    _wanted: list[int]
    _failed: dict[int, tuple[float, RemoteError]]  # until when, why

    def __init__(
        self,
        spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        index_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_gb: float = 50.0,
        allow_truncated: bool = False,
        open_files: int = 32,
        timeout: float = 30.0,
        retries: int = 5,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.urls = expand_urls(spec)
        self.index_dir = Path(index_dir) if index_dir else DEFAULT_CACHE / "indexes"
        self.cache = RemoteCache(
            Path(cache_dir) if cache_dir else DEFAULT_CACHE / "shards",
            int(cache_gb * 1e9),
            timeout=timeout,
            retries=retries,
        )
        self.allow_truncated = allow_truncated
        self.open_files = max(1, open_files)
        self._reset_process()
        self.indexes = tuple(self._read_indexes(progress))
        self.lengths: NDArray[np.int64] = np.array([len(i) for i in self.indexes], dtype=np.int64)
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        """Samples in all shards."""
        return int(self.starts[-1])

    @property
    def faults(self) -> dict[str, int]:
        """Members and samples that the indexes left out or doubt, counted by cause."""
        total: Counter[str] = Counter()
        for index in self.indexes:
            total.update(index.faults)
            total["truncated shard"] += bool(index.truncated)
        return {cause: count for cause, count in sorted(total.items()) if count}

    def fingerprint(self) -> str:
        """sha256 over the shards' base names, sizes and keys: equal for the same data elsewhere."""
        digest = hashlib.sha256()
        for index in self.indexes:
            digest.update(f"{index.shard}\0{index.size}\0{len(index)}\0".encode())
            digest.update(index.key_bytes.tobytes())
        return digest.hexdigest()

    def name(self, shard: int) -> str:
        """Path or address of a shard, without secrets: for messages."""
        return public_name(self.urls[shard])

    def key(self, shard: int, sample: int) -> str:
        """Key of a sample."""
        return self.indexes[shard].key(sample)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, sample) of the n-th sample over all shards in order."""
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        shard = int(np.searchsorted(self.starts, position, side="right")) - 1
        return shard, position - int(self.starts[shard])

    def read_members(
        self, shard: int, sample: int, extensions: Collection[str] | None = None
    ) -> dict[str, bytes]:
        """The bytes of a sample's members, by extension.

        Args:
            shard: index into ``urls``.
            sample: index into the shard.
            extensions: read only these (absent ones are passed over); None reads all.

        Raises:
            SampleFault: ``unreadable``, ``unreachable`` (remote, after retries) or
                ``shard changed`` (it no longer has the bytes that its index promises).
            IndexError: there is no such sample.
        """
        index = self.indexes[shard]
        if not 0 <= sample < len(index):
            raise IndexError(f"sample {sample} of {len(index)} in {self.name(shard)}")
        members = [m for m in index.members(sample) if extensions is None or m[0] in extensions]
        total = sum(member.size for member in members)
        if total > _MOST_MEMBERS:
            raise SampleFault("too large", f"{total} bytes, the limit is {_MOST_MEMBERS}")
        self._own_process()
        try:
            if shard not in self._handles:
                self.local_path(shard)  # before the lock, as a download takes long
            with self._lock:  # threads must not close a handle that another one reads from
                return _read(self._descriptor(shard), members)
        except RemoteError as error:
            raise SampleFault("unreachable", str(error)) from error
        except OSError as error:
            detail = f"{self.name(shard)}: {error.strerror or error}"
            raise SampleFault("unreadable", detail) from error

    def local_path(self, shard: int, *, wait: bool = True) -> Path:
        """The shard as a local file; a remote one is fetched into the cache.

        Raises:
            RemoteError: it could not be fetched, now or within the last minute.
            BlockingIOError: ``wait`` is false and another thread or process is fetching it.
        """
        url = self.urls[shard]
        if not is_remote(url):
            return Path(url)
        until, failure = self._failed.get(shard, (0.0, None))
        if failure is not None and time.monotonic() < until:
            raise failure.with_traceback(None)
        try:
            return self.cache.fetch(url, wait=wait)
        except RemoteError as error:
            self._failed[shard] = (time.monotonic() + _COOL_DOWN, error)
            raise

    def remote_bytes(self, shards: Iterable[int]) -> int:
        """Size of those of these shards that are remote."""
        return sum(self.indexes[s].size for s in shards if is_remote(self.urls[s]))

    def prefetch(self, shards: Iterable[int], max_bytes: float = float("inf")) -> None:
        """Start fetching remote shards in the background, in this order; returns at once.

        It goes as far as the cache, or ``max_bytes``, holds: more would evict what is needed
        first. Failures are left to whoever reads the shard. A new call takes the place of what an
        earlier one has not begun yet. What another process is fetching is passed over, so that
        the workers of a machine fetch different shards at a time.
        """
        room = min(max_bytes, self.cache.max_bytes)
        wanted = []
        for shard in shards:
            room -= self.remote_bytes([shard])
            if room < 0:
                break
            if is_remote(self.urls[shard]):
                wanted.append(shard)
        self._own_process()
        with self._lock:
            self._wanted = wanted
            if wanted and (self._fetcher is None or not self._fetcher.is_alive()):
                self._fetcher = threading.Thread(target=self._fetch_wanted, daemon=True)
                self._fetcher.start()

    def close(self) -> None:
        """Close the file handles of this process; reading opens them again."""
        self._own_process()
        with self._lock:
            self._wanted = []
            for descriptor in self._handles.values():
                os.close(descriptor)
            self._handles.clear()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_pid", "_handles", "_lock", "_wanted", "_fetcher", "_failed")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_process()

    def _reset_process(self) -> None:
        self._pid = os.getpid()
        self._handles = OrderedDict()
        self._lock = threading.RLock()
        self._wanted = []
        self._fetcher = None
        self._failed = {}

    def _own_process(self) -> None:
        """After a fork, forget the parent's thread; its file handles are good for pread.

        The lock may have been held by that thread, which is not there to give it back.
        """
        if self._pid != os.getpid():
            self._pid, self._wanted, self._fetcher = os.getpid(), [], None
            self._lock = threading.RLock()

    def _fetch_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._fetcher = None
                    return
                shard = self._wanted.pop(0)
            try:
                self.local_path(shard, wait=False)
            except BlockingIOError:
                continue
            except OSError as error:
                logger.warning("prefetch: %s", error)

    def _descriptor(self, shard: int) -> int:
        if shard in self._handles:
            self._handles.move_to_end(shard)
            return self._handles[shard]
        descriptor = self._open(shard)
        if os.fstat(descriptor).st_size != self.indexes[shard].size:
            os.close(descriptor)
            raise SampleFault(
                "shard changed",
                f"{self.name(shard)} no longer has the {self.indexes[shard].size} bytes that its "
                "index was made of: restart the run, and delete its .index.npz if that stays",
            )
        self._handles[shard] = descriptor
        if len(self._handles) > self.open_files:
            os.close(self._handles.popitem(last=False)[1])
        return descriptor

    def _open(self, shard: int) -> int:
        for _ in range(3):  # another process may evict it between fetching and opening
            try:
                return os.open(self.local_path(shard), os.O_RDONLY)
            except FileNotFoundError:
                if not is_remote(self.urls[shard]):
                    raise
        raise RemoteError(self.urls[shard], "evicted as soon as fetched: raise cache_gb")

    def _read_indexes(self, progress: Callable[[int, int], None] | None) -> list[ShardIndex]:
        indexes: list[ShardIndex] = []
        pool = ThreadPoolExecutor(max_workers=8)
        try:
            for index in pool.map(self._read_index, self.urls):
                indexes.append(index)
                if progress is not None:
                    progress(len(indexes), len(self.urls))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, don't fetch the rest first
        return indexes

    def _read_index(self, url: str) -> ShardIndex:
        if not is_remote(url):
            return read_index(url, index_dir=self.index_dir, allow_truncated=self.allow_truncated)
        stored = index_path(self.cache.path_of(url), self.index_dir)
        index = self._stored_index(stored) or self._published_index(url)
        if index is None:
            logger.info("%s has no index beside it: it is fetched for one", public_name(url))
            # As local shards are checked by time as well, a copy's own time must not be kept.
            index = without_mtime(build_index(self.cache.fetch(url)))
        name = os.path.basename(urlsplit(url).path)
        index = dataclasses.replace(index, shard=name)
        if not stored.exists():
            try:
                stored.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(stored, index.to_bytes())
            except OSError as error:
                logger.warning("cannot store the index of %s: %s", name, error)
        if index.truncated and not self.allow_truncated:
            raise ValueError(truncated_message(public_name(url), index))
        return index

    def _stored_index(self, path: Path) -> ShardIndex | None:
        try:
            return ShardIndex.from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s is made again: %s", path, error)
            path.unlink(missing_ok=True)
            return None

    def _published_index(self, url: str) -> ShardIndex | None:
        """The index beside a remote shard, if there is a sound one."""
        parts = urlsplit(url)
        beside = urlunsplit(parts._replace(path=parts.path + INDEX_SUFFIX))
        data = self.cache.fetch_bytes(beside)
        if data is None:
            return None
        try:
            return without_mtime(ShardIndex.from_bytes(data))
        except ValueError as error:
            logger.warning("%s: %s", public_name(beside), error)
            return None


def _read(descriptor: int, members: list[Member]) -> dict[str, bytes]:
    """Read members by byte range, in one go where they lie close together."""
    if not members:
        return {}
    start = min(member.offset for member in members)
    end = max(member.offset + member.size for member in members)
    if end - start <= sum(member.size for member in members) + _GAP:
        block = _read_range(descriptor, start, end - start)
        return {m.extension: block[m.offset - start : m.offset - start + m.size] for m in members}
    return {m.extension: _read_range(descriptor, m.offset, m.size) for m in members}


def _read_range(descriptor: int, offset: int, size: int) -> bytes:
    # pread has no file position, so that forked processes may share a descriptor.
    parts = []
    while size > 0:
        part = os.pread(descriptor, size, offset)
        if not part:
            raise SampleFault("shard changed", f"it ends before byte {offset + size}")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
