from __future__ import annotations

import http.server
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_maker import make_shards

from multikd.data.decode import SampleFault, decode_label
from multikd.data.index import build_index, index_path, read_index
from multikd.data.remote import RemoteCache, RemoteError, public_name
from multikd.data.sources import ShardSource, expand_braces, expand_urls


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a", ["a"]),
        ("a{0..2}.tar", ["a0.tar", "a1.tar", "a2.tar"]),
        ("a{008..011}", ["a008", "a009", "a010", "a011"]),
        ("{x,y}{1..2}", ["x1", "x2", "y1", "y2"]),
        ("{a,b{1..2}}z", ["az", "b1z", "b2z"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("a{}b", ["a{}b"]),
        ("a{b}c{1,2}", ["a{b}c1", "a{b}c2"]),
        ("a{1..", ["a{1.."]),
    ],
)
def test_braces(text: str, expected: list[str]) -> None:
    assert expand_braces(text) == expected


def test_braces_have_a_bound() -> None:
    with pytest.raises(ValueError, match="more than"):
        expand_braces("{0..99999999999}")


def test_expand_urls(tmp_path: Path) -> None:
    shards = make_shards(tmp_path / "a b", [1, 1, 1])
    pattern = str(tmp_path / "a b" / "s-{000..002}.tar")
    assert expand_urls(pattern) == shards
    assert expand_urls(str(tmp_path / "a b")) == shards
    assert expand_urls(tmp_path / "a b" / "s-00[01].tar") == shards[:2]
    assert expand_urls([shards[2], shards[0]]) == [shards[2], shards[0]]
    assert expand_urls("file://" + shards[0].replace(" ", "%20")) == shards[:1]
    assert expand_urls("https://h/a-{0..1}.tar?k=*") == [
        "https://h/a-0.tar?k=*",
        "https://h/a-1.tar?k=*",
    ]
    odd = tmp_path / "odd{1,2}[x].tar"
    shutil.copy(shards[0], odd)
    assert expand_urls(str(odd)) == [str(odd)]  # the file of that very name comes first


def test_urls_that_match_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").touch()
    cases: list[tuple[str | list[str], str]] = [
        (str(tmp_path / "x-{0..2}.tar"), "there is no shard .*x-0"),
        (str(tmp_path / "*.tar"), "no shard matches"),
        (str(tmp_path / "empty"), "holds no .tar: make shards with"),
        (str(tmp_path / "packed"), "'a.tar.gz' is compressed"),
        ([], "received an empty list"),
        ("", "received an empty string"),
        ("pipe:cat x.tar", "sequential mode"),
        ("s3://bucket/x.tar", "cannot read s3://"),
    ]
    for spec, message in cases:
        with pytest.raises(ValueError, match=message):
            expand_urls(spec)


def keys_and_labels(source: ShardSource) -> list[tuple[str, int]]:
    found = []
    for position in range(len(source)):
        shard, sample = source.locate(position)
        members = source.read_members(shard, sample)
        assert members["png"].startswith(b"\x89PNG")
        found.append((source.key(shard, sample), decode_label(members)))
    return found


def test_samples_of_unequal_shards(tmp_path: Path) -> None:
    source = ShardSource(make_shards(tmp_path, [3, 1, 7]))
    assert source.lengths.tolist() == [3, 1, 7]
    assert source.starts.tolist() == [0, 3, 4, 11]
    assert keys_and_labels(source) == [(f"s-{i}", i % 10) for i in range(11)]
    assert source.read_members(2, 6, ["cls"]) == {"cls": b"0"}
    assert source.faults == {}
    for shard, sample in ((0, 3), (0, -1)):
        with pytest.raises(IndexError):
            source.read_members(shard, sample)
    with pytest.raises(IndexError):
        source.locate(11)
    source.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that is what is tested
def test_handles_are_bounded_pickled_and_forked(tmp_path: Path) -> None:
    source = ShardSource(make_shards(tmp_path, [2] * 6), open_files=2)
    expected = keys_and_labels(source)
    assert len(source._handles) == 2
    copy = pickle.loads(pickle.dumps(source))
    assert keys_and_labels(copy) == expected
    copy.close()
    child = os.fork()
    if child == 0:
        os._exit(0 if keys_and_labels(source) == expected else 1)
    assert keys_and_labels(source) == expected
    assert os.waitpid(child, 0)[1] == 0
    source.close()


def test_fingerprint_is_of_the_data_not_of_its_place(tmp_path: Path) -> None:
    first = ShardSource(make_shards(tmp_path / "a", [3, 2]))
    same = ShardSource(make_shards(tmp_path / "b", [3, 2]))
    other = ShardSource(make_shards(tmp_path / "c", [2, 3]))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()


def test_bad_shards_are_found_before_reading(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [4, 4])
    data = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(data[:6000])
    with pytest.raises(ValueError, match=r"s-001\.tar is truncated"):
        ShardSource(shards)
    source = ShardSource(shards, allow_truncated=True)
    assert 4 < len(source) < 8
    assert source.faults == {"truncated shard": 1}
    Path(shards[0]).write_bytes(b"")
    with pytest.raises(ValueError, match=r"s-000\.tar is empty"):
        ShardSource(shards, allow_truncated=True)


def test_shard_that_changes_or_goes_away_costs_samples_not_the_run(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2, 2])
    source = ShardSource(shards)
    os.unlink(shards[0])
    make_shards(tmp_path, [0, 40])
    os.unlink(shards[0])
    with pytest.raises(SampleFault) as gone:
        source.read_members(0, 0)
    assert gone.value.cause == "unreadable"
    with pytest.raises(SampleFault) as changed:
        source.read_members(1, 0)
    assert changed.value.cause == "shard changed"


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, counts requests, and misbehaves on demand."""

    daemon_threads = True
    root: Path
    requests: list[tuple[str, str]]  # path, Range header
    failures: dict[str, list[int | str]]  # path → what to do first: a status, or "cut" or "hang"
    ranges: bool = True
    etag: str = '"1"'

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, path: str) -> int:
        return sum(request[0] == path for request in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        header = self.headers.get("Range", "")
        self.server.requests.append((path, header))
        todo = self.server.failures.get(path) or [200]
        act = todo.pop(0)
        file = self.server.root / path.lstrip("/")
        if act == "hang":
            time.sleep(1.0)
            return
        if not file.is_file():
            act = 404
        if isinstance(act, int) and act != 200:
            self.send_error(act)
            return
        data = file.read_bytes()
        start = 0
        match = re.match(r"bytes=(\d+)-", header)
        if match and self.server.ranges and self.headers.get("If-Range") == self.server.etag:
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        body = data[start:]
        self.wfile.write(body[: len(body) // 2] if act == "cut" else body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server(("127.0.0.1", 0), Handler)
    server.root, server.requests, server.failures = tmp_path / "served", [], {}
    server.root.mkdir()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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


def test_unreachable_shard_is_a_sample_fault(tmp_path: Path, server: Server) -> None:
    make_shards(server.root, [2])
    read_index(server.root / "s-000.tar")
    source = ShardSource(
        server.base + "/s-000.tar", cache_dir=tmp_path / "c", index_dir=tmp_path / "i", retries=0
    )
    server.failures["/s-000.tar"] = [503]
    with pytest.raises(SampleFault) as caught:
        source.read_members(0, 0)
    assert caught.value.cause == "unreachable"
    assert source.read_members(0, 0)
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
