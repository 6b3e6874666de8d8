from __future__ import annotations

import base64
import logging
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from shard_maker import make_shards
from shard_server import Server

from multikd.data import sources
from multikd.data.decode import SampleFault, decode_label
from multikd.data.index import build_index, index_path, read_index
from multikd.data.module import ShardDataModule
from multikd.data.remote import RemoteCache, RemoteError, public_name
from multikd.data.sequential import SequentialShards
from multikd.data.sources import ShardSource
from multikd.data.views import LightViews
from multikd.files import file_lock


def keys_and_labels(source: ShardSource) -> list[tuple[str, int]]:
    found = []
    for position in range(len(source)):
        shard, sample = source.locate(position)
        found.append((source.key(shard, sample), decode_label(source.read_members(shard, sample))))
    return found


def remote_cache(tmp_path: Path, max_bytes: int = 10**9, **options: float) -> RemoteCache:
    return RemoteCache(tmp_path / "cache", max_bytes, **({"pause": 0.01, "timeout": 5} | options))


def test_remote_shards_are_read_as_local_ones(tmp_path: Path, server: Server) -> None:
    make_shards(server.root, [3, 2])
    local = ShardSource(str(server.root), index_dir=tmp_path / "i0")
    spec = server.base + "/s-{000..001}.tar"
    options = {"cache_dir": tmp_path / "cache", "index_dir": tmp_path / "indexes"}
    os.unlink(index_path(server.root / "s-000.tar"))  # one has no index: it is fetched for that
    remote = ShardSource(spec, **options)
    assert server.count("/s-000.tar") == 1
    assert server.count("/s-001.tar") == 0
    assert keys_and_labels(remote) == keys_and_labels(local)
    assert remote.fingerprint() == local.fingerprint()
    assert server.count("/s-001.tar") == 1
    server.requests.clear()
    again = ShardSource(spec, **options)
    assert keys_and_labels(again) == keys_and_labels(local)
    assert server.requests == []  # all of it is in the cache
    for source in (local, remote, again):
        source.close()


def test_remote_truncated_shard_is_an_error(tmp_path: Path, server: Server) -> None:
    make_shards(server.root, [4])
    path = server.root / "s-000.tar"
    path.write_bytes(path.read_bytes()[:3000])
    options = {"cache_dir": tmp_path / "cache", "index_dir": tmp_path / "indexes"}
    for _ in range(2):  # from the shard, then from the stored index
        with pytest.raises(ValueError, match="truncated"):
            ShardSource(server.base + "/s-000.tar?secret=1", **options)


def test_prefetch(tmp_path: Path, server: Server) -> None:
    make_shards(server.root, [2, 2, 2])
    for path in sorted(server.root.glob("*.tar")):
        read_index(path)
    source = ShardSource(
        server.base + "/s-{000..002}.tar", cache_dir=tmp_path / "c", index_dir=tmp_path / "i"
    )
    source.prefetch([2, 0])
    deadline = time.monotonic() + 10
    while sum(server.count(f"/s-00{i}.tar") for i in (0, 2)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.read_members(2, 0)
    assert source.read_members(0, 0)
    assert [server.count(f"/s-00{i}.tar") for i in range(3)] == [1, 0, 1]
    source.close()


def settled(source: ShardSource) -> None:
    """Wait until nothing is being prefetched."""
    if (thread := source._fetcher) is not None:
        thread.join(10)
        assert not thread.is_alive()


def remote_source(
    tmp_path: Path, server: Server, lengths: list[int], **options: Any
) -> ShardSource:
    """Shards on the server with indexes beside them, of which nothing is fetched yet."""
    for url in make_shards(server.root, lengths):
        read_index(url)
    source = ShardSource(
        f"{server.base}/s-{{000..{len(lengths) - 1:03d}}}.tar",
        **{"cache_dir": tmp_path / "c", "index_dir": tmp_path / "i", **options},
    )
    server.requests.clear()
    return source


def test_prefetch_takes_no_more_than_the_cache_holds(tmp_path: Path, server: Server) -> None:
    source = remote_source(tmp_path, server, [2] * 5)
    size = source.indexes[0].size
    source.cache.max_bytes = 3 * size
    for _ in range(3):  # or each would evict what the next needs, and fetch for ever
        source.prefetch([4, 0, 1, 2, 3])
        settled(source)
    assert sorted(path for path, _ in server.requests) == [f"/s-00{i}.tar" for i in (0, 1, 4)]
    source.prefetch([2, 3], max_bytes=size)
    settled(source)
    assert server.count("/s-002.tar") == 1
    assert server.count("/s-003.tar") == 0
    source.close()


def test_prefetch_passes_over_what_another_is_fetching(tmp_path: Path, server: Server) -> None:
    source = remote_source(tmp_path, server, [2, 2])
    path = source.cache.path_of(source.urls[0])
    path.parent.mkdir()
    with file_lock(path.with_name(path.name + ".lock")):
        source.prefetch([0, 1])
        settled(source)
        assert [path for path, _ in server.requests] == ["/s-001.tar"]
        with pytest.raises(BlockingIOError):
            source.cache.fetch(source.urls[0], wait=False)
    source.close()


def test_reading_goes_on_while_a_shard_is_fetched(tmp_path: Path, server: Server) -> None:
    source = remote_source(tmp_path, server, [2, 2], retries=1)
    assert source.read_members(0, 0)
    server.failures["/s-001.tar"] = ["wait"]
    reader = threading.Thread(target=source.read_members, args=(1, 0))
    reader.start()
    while not server.count("/s-001.tar"):
        time.sleep(0.005)
    assert source.read_members(0, 1)
    assert reader.is_alive()  # the other shard is still on its way
    server.released.set()
    reader.join()
    source.close()


def test_password_in_an_address_is_sent_and_not_shown(tmp_path: Path, server: Server) -> None:
    (server.root / "x").write_bytes(b"abc")
    url = server.base.replace("//", "//me:sesame%21@") + "/x"
    assert remote_cache(tmp_path).fetch(url).read_bytes() == b"abc"
    assert server.authorization == "Basic " + base64.b64encode(b"me:sesame!").decode()
    with pytest.raises(RemoteError) as caught:
        remote_cache(tmp_path, retries=0).fetch("http://me:sesame@127.0.0.1:9/y")
    assert "sesame" not in str(caught.value)


def test_eviction_leaves_files_of_others_alone(tmp_path: Path, server: Server) -> None:
    (server.root / "x").write_bytes(b"abc" * 100)
    cache = remote_cache(tmp_path, max_bytes=10)
    cache.directory.mkdir()
    (cache.directory / "thesis.tex").write_text("years of work")
    cache.fetch(server.base + "/x")
    assert (cache.directory / "thesis.tex").exists()


def test_passing_failures_are_retried_and_downloads_resumed(tmp_path: Path, server: Server) -> None:
    data = os.urandom(300_000)
    (server.root / "x").write_bytes(data)
    server.failures["/x"] = [503, "cut", "cut", 200]
    path = remote_cache(tmp_path).fetch(server.base + "/x")
    assert path.read_bytes() == data
    assert [header for _, header in server.requests] == [
        "", "", "bytes=150000-", "bytes=225000-",
    ]  # fmt: skip


def test_file_that_changes_between_two_tries_is_not_joined(tmp_path: Path, server: Server) -> None:
    (server.root / "x").write_bytes(b"a" * 1000)
    server.failures["/x"] = ["cut"] * 1
    with pytest.raises(RemoteError):
        remote_cache(tmp_path, retries=0).fetch(server.base + "/x")
    (server.root / "x").write_bytes(b"b" * 1200)
    server.etag = '"2"'
    assert remote_cache(tmp_path).fetch(server.base + "/x").read_bytes() == b"b" * 1200


def test_server_without_ranges(tmp_path: Path, server: Server) -> None:
    server.ranges = False
    (server.root / "x").write_bytes(b"abc" * 1000)
    server.failures["/x"] = ["cut"]
    assert remote_cache(tmp_path).fetch(server.base + "/x").read_bytes() == b"abc" * 1000


def test_lasting_failures(tmp_path: Path, server: Server) -> None:
    cache = remote_cache(tmp_path, retries=2)
    with pytest.raises(RemoteError, match="HTTP 404"):
        cache.fetch(server.base + "/none?token=secret")
    assert server.count("/none") == 1  # not retried
    (server.root / "x").write_bytes(b"abc")
    server.failures["/x"] = [500] * 3
    with pytest.raises(RemoteError, match=r"HTTP 500.*3 tries"):
        cache.fetch(server.base + "/x")
    server.failures["/x"] = ["hang"]
    with pytest.raises(RemoteError, match="timed out"):
        remote_cache(tmp_path, retries=0, timeout=0.2).fetch(server.base + "/x")
    with pytest.raises(RemoteError, match="1 tries"):
        remote_cache(tmp_path, retries=0).fetch("http://127.0.0.1:9/x")
    assert not [p for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")]


def test_messages_hold_no_secrets() -> None:
    assert public_name("https://me:pw@host:1/a.tar?token=t#f") == "https://host:1/a.tar"
    assert "secret" not in str(RemoteError("http://h/x?k=secret", "no"))


def test_least_recently_used_goes_first(tmp_path: Path, server: Server) -> None:
    for name in "abcd":
        (server.root / name).write_bytes(name.encode() * 1000)
    cache = remote_cache(tmp_path, max_bytes=3000)
    for name in ("a", "b", "c", "a", "d"):
        cache.fetch(f"{server.base}/{name}")
        time.sleep(0.002)
    kept = {name for name in "abcd" if cache.path_of(f"{server.base}/{name}").exists()}
    assert kept == {"a", "c", "d"}
    small = remote_cache(tmp_path, max_bytes=10)
    assert small.fetch(f"{server.base}/b").read_bytes() == b"b" * 1000  # the newest always stays


def test_eviction_under_a_reader_only_costs_another_download(
    tmp_path: Path, server: Server
) -> None:
    make_shards(server.root, [2, 2])
    for path in sorted(server.root.glob("*.tar")):
        read_index(path)
    source = ShardSource(
        server.base + "/s-{000..001}.tar",
        cache_dir=tmp_path / "c",
        index_dir=tmp_path / "i",
        cache_gb=1e-9,
        open_files=1,
    )
    for shard, sample in ((0, 0), (1, 0), (0, 1), (1, 1)):
        assert source.read_members(shard, sample)
    assert server.count("/s-000.tar") == 2
    source.close()


def _fetch_in_process(directory: str, url: str) -> None:
    os.environ["no_proxy"] = "127.0.0.1"
    RemoteCache(Path(directory), 10**9).fetch(url)


def test_processes_share_one_download(tmp_path: Path, server: Server) -> None:
    (server.root / "x").write_bytes(os.urandom(2_000_000))
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "cache"), server.base + "/x")
    processes = [context.Process(target=_fetch_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert server.count("/x") == 1


def test_unreachable_shard_is_a_sample_fault(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(server.root, [2])
    read_index(server.root / "s-000.tar")
    source = ShardSource(
        server.base + "/s-000.tar", cache_dir=tmp_path / "c", index_dir=tmp_path / "i", retries=0
    )
    server.failures["/s-000.tar"] = [503]
    with pytest.raises(SampleFault) as caught:
        source.read_members(0, 0)
    assert caught.value.cause == "unreachable"
    with pytest.raises(SampleFault, match="HTTP 503"):
        source.read_members(0, 1)  # at once: not another round of retries for each sample
    assert server.count("/s-000.tar") == 1
    monkeypatch.setattr(sources, "_COOL_DOWN", -1.0)
    server.failures["/s-000.tar"] = [503]
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(SampleFault):
        source.read_members(0, 0)
    assert source.read_members(0, 0)  # after the pause it is asked again
    source.close()


def test_hostile_published_index_is_not_used(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    make_shards(server.root, [2])
    shard = server.root / "s-000.tar"
    index_path(shard).write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with caplog.at_level(logging.WARNING):
        source = ShardSource(
            server.base + "/s-000.tar", cache_dir=tmp_path / "c", index_dir=tmp_path / "i"
        )
    assert "not a usable shard index" in caplog.text
    assert source.indexes[0].keys == build_index(shard).keys
    source.close()


def training(tmp_path: Path, server: Server, **settings: Any) -> ShardDataModule:
    """Twelve very unequal remote shards, of which nothing is fetched yet."""
    for url in make_shards(server.root, [1, 30, 2, 17, 9, 1, 1, 24, 5, 12, 3, 8]):
        read_index(url)
    options = {
        "train_views": LightViews(16),
        "batch_size": 4,
        "window_shards": 2,
        "index_dir": str(tmp_path / "i"),
        "shard_cache": str(tmp_path / "c"),
        **settings,
    }
    return ShardDataModule(server.base + "/s-{000..011}.tar", **options)


def test_training_has_its_shards_fetched_ahead_of_use(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = training(tmp_path, server, num_workers=0)
    order = module.train_order()
    source = module._open("train").reader.sources[0]
    waited: list[str] = []
    fetch = RemoteCache.fetch

    def noting(cache: RemoteCache, url: str, *, wait: bool = True) -> Path:
        if (
            threading.current_thread() is threading.main_thread()
            and not cache.path_of(url).exists()
        ):
            waited.append(url)
        return fetch(cache, url, wait=wait)

    monkeypatch.setattr(RemoteCache, "fetch", noting)
    loader = module.train_dataloader()
    for number, batch in enumerate(loader):
        settled(source)  # as if training were slow
        ahead = order.shards_ahead(0, 4 * number)[0]
        assert all(source.cache.path_of(source.urls[shard]).exists() for shard in ahead)
        assert int(batch.positions[0]) == 4 * number
    assert set(waited) <= {source.urls[shard] for shard in order.shards_ahead(0, 0)[0]}
    assert sorted(path for path, _ in server.requests if path.endswith(".tar")) == [
        f"/s-{shard:03d}.tar" for shard in range(12)
    ]
    module.teardown()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_fetch_each_remote_shard_once_and_keep_the_order(
    tmp_path: Path, server: Server
) -> None:
    remote = training(tmp_path, server, num_workers=2)
    local = ShardDataModule(
        str(server.root), train_views=LightViews(16), batch_size=4, window_shards=2, num_workers=0
    )
    for epoch in range(2):
        found = []
        for module in (remote, local):
            loader = module.train_dataloader()
            loader.set_epoch(epoch)
            found.append([key for batch in loader for key in batch.keys])
        assert found[0] == found[1]
    for shard in range(12):
        assert server.count(f"/s-{shard:03d}.tar") == 1
    remote.teardown()
    local.teardown()


def test_a_cache_too_small_for_a_window_is_told(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    module = training(tmp_path, server, num_workers=0, shard_cache_gb=20e-6)
    with caplog.at_level(logging.WARNING):
        module.setup("fit")
    assert "raise shard_cache_gb or lower window_shards" in caplog.text
    assert len(list(module.train_dataloader())) == 28  # slow, but it trains
    module.teardown()


def test_the_stream_fetches_the_next_shard_while_one_is_read(
    tmp_path: Path, server: Server
) -> None:
    source = remote_source(tmp_path, server, [4, 4, 4])
    cache = remote_cache(tmp_path)
    stream = SequentialShards(source.urls, [LightViews(16)], 2, 6, remote=cache, shuffle_buffer=0)
    batches = iter(stream)
    next(batches)
    deadline = time.monotonic() + 10
    while not cache.path_of(source.urls[1]).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert cache.path_of(source.urls[1]).exists()
    assert not cache.path_of(source.urls[2]).exists()
    keys = [key for batch in batches for key in batch.keys]
    assert keys == [f"s-{number}" for number in range(2, 12)]
    # Behind the last shard comes the first again, in the next turn.
    assert [server.count(f"/s-00{i}.tar") for i in range(3)] == [1, 1, 1]
    source.close()
