"""Remote shards from a server that does everything wrong, and folders that are full."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data.shard_maker import make_shards

from multikd.data import remote
from multikd.data.remote import RemoteCache, RemoteError


class Flaky(http.server.ThreadingHTTPServer):
    """Serves ``data`` at every ``.tar``; ``acts`` are what it does first, one a request."""

    daemon_threads = True
    data: bytes = b""
    manifest: dict[str, Any] | None = None
    acts: list[str]
    seen: list[str]  # Range headers

    def url(self, name: str = "a.tar") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Flaky

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.endswith("dataset.json"):
            if self.server.manifest is None:
                self.send_error(404)
            else:
                self.answer(200, json.dumps(self.server.manifest).encode())
            return
        wanted = self.headers.get("Range", "")
        self.server.seen.append(wanted)
        act = self.server.acts.pop(0) if self.server.acts else "ok"
        data = self.server.data
        match = re.match(r"bytes=(\d+)-", wanted)
        start = int(match[1]) if match and self.headers.get("If-Range") == '"1"' else 0
        body, half = data[start:], len(data[start:]) // 2
        if act.isdigit():
            self.send_response(int(act))
            self.send_header("Content-Length", "0")
            self.send_header("Retry-After", "0")
            self.end_headers()
        elif act == "reset":
            self.connection.close()
        elif act == "cut":
            self.answer(206 if start else 200, body, body[:half])
        elif act == "longer":  # promises more than it has
            self.answer(200, data + b"x" * 9, data)
        elif act == "shorter":  # sends more than it promises
            self.answer(200, data[:-9], data)
        elif act == "wrong length":
            self.answer(200, data, length="many")
        elif act == "flipped":
            self.answer(200, data, data[:-1] + bytes([data[-1] ^ 1]))
        elif act == "wrong range":  # begins elsewhere than asked
            self.answer(206, data[start + 7 :], said=f"bytes {start + 7}-{len(data)}/{len(data)}")
        elif act == "trickle":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for place in range(8):
                self.wfile.write(data[place : place + 1])
                self.wfile.flush()
                time.sleep(0.1)
        elif act == "elsewhere":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/a.tar")
            self.end_headers()
        else:
            self.answer(206 if start else 200, body)

    def answer(
        self, status: int, whole: bytes, sent: bytes | None = None, length: str = "", said: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", length or str(len(whole)))
        self.send_header("ETag", '"1"')
        if said:
            self.send_header("Content-Range", said)
        self.end_headers()
        self.wfile.write(whole if sent is None else sent)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    flaky = Flaky(("127.0.0.1", 0), Handler)
    flaky.acts, flaky.seen, flaky.data = [], [], os.urandom(300_000)
    thread = threading.Thread(target=flaky.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield flaky
    flaky.shutdown()
    thread.join()
    flaky.server_close()


def cache_of(folder: Path, **settings: Any) -> RemoteCache:
    return RemoteCache(folder / "c", 1 << 30, **{"timeout": 2.0, "pause": 0.01, **settings})


@pytest.mark.parametrize(
    "acts",
    [
        ["reset"],
        ["503", "429", "500"],
        ["cut"],
        ["cut", "reset", "cut"],
        ["cut", "416"],
        ["cut", "wrong range"],
        ["longer"],
        ["trickle"],
        ["cut", "503", "cut", "reset", "416"],
    ],
    ids=" ".join,
)
def test_what_comes_is_whole_whatever_went_before(
    acts: list[str], server: Flaky, tmp_path: Path
) -> None:
    server.acts = list(acts)
    timeout = 0.4 if "trickle" in acts else 2.0
    path = cache_of(tmp_path, timeout=timeout).fetch(server.url())
    assert path.read_bytes() == server.data
    assert len(server.seen) == len(acts) + 1
    assert [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []


def test_a_length_that_is_no_number_is_no_length(server: Flaky, tmp_path: Path) -> None:
    server.acts = ["wrong length"]
    assert cache_of(tmp_path).fetch(server.url()).read_bytes() == server.data


def test_a_cut_download_goes_on_where_it_stopped(server: Flaky, tmp_path: Path) -> None:
    server.acts = ["cut", "cut"]
    cache_of(tmp_path).fetch(server.url())
    assert server.seen == ["", "bytes=150000-", "bytes=225000-"]


def test_checksums_of_the_manifest(server: Flaky, tmp_path: Path) -> None:
    digest = hashlib.sha256(server.data).hexdigest()
    entry = {"name": "a.tar", "bytes": len(server.data), "sha256": digest}
    server.manifest = {"shards": [entry]}
    server.acts = ["flipped", "shorter"]
    path = cache_of(tmp_path).fetch(server.url())
    assert path.read_bytes() == server.data
    assert len(server.seen) == 3
    server.manifest = {"shards": [entry | {"sha256": "0" * 64}]}
    with pytest.raises(RemoteError, match=r"not what dataset.json beside it promises"):
        cache_of(tmp_path / "b", retries=1).fetch(server.url())
    for bad in ({"shards": 3}, {"shards": [{"sha256": "0" * 64}]}, {}):
        server.manifest = bad  # a broken one promises nothing
        cache_of(tmp_path / str(bad)).fetch(server.url())


def test_the_writer_s_checksums_are_those_of_its_shards(tmp_path: Path) -> None:
    from PIL import Image

    from multikd.data.manifest import read_manifest
    from multikd.data.writer import write_shards

    (tmp_path / "p").mkdir()
    for number in range(3):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "p" / f"{number}.png")
    write_shards(tmp_path / "p", tmp_path / "out", samples_per_shard=2)
    shards = (read_manifest(tmp_path / "out") or {})["shards"]
    assert len(shards) == 2
    for entry in shards:
        data = (tmp_path / "out" / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_redirections_stay_on_the_web(server: Flaky, tmp_path: Path) -> None:
    server.acts = ["elsewhere"] * 9
    with pytest.raises(RemoteError, match="leads away from http"):
        cache_of(tmp_path, retries=1).fetch(server.url())


def test_pauses_grow_and_are_not_the_same_for_all(
    server: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    for turn in range(4):
        server.acts = ["503"] * 4
        cache_of(tmp_path / str(turn), pause=1.0).fetch(server.url())
    for turn in range(4):
        four = waits[4 * turn : 4 * turn + 4]
        for number, wait in enumerate(four):
            assert 0.5 * 2**number <= wait <= 1.5 * 2**number
    assert len(set(waits)) == 16


def test_an_address_that_cannot_be_asked_for_shows_no_secret(tmp_path: Path) -> None:
    for url in ("http://h:port/a.tar?token=TOKEN123", "http://u:hunter2@h /a b.tar?token=TOKEN123"):
        with pytest.raises(RemoteError) as caught:
            cache_of(tmp_path, retries=0).fetch(url)
        assert "TOKEN123" not in str(caught.value)
        assert "hunter2" not in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_the_cache(server: Flaky, small_disk: Path) -> None:
    cache = cache_of(small_disk)
    with pytest.raises(RemoteError, match="No space left"):
        cache.fetch(server.url())
    assert len(server.seen) == 1  # trying again would not help
    assert not [p for p in (small_disk / "c").iterdir() if p.stat().st_size]
    server.data = server.data[:50_000]
    assert cache.fetch(server.url("b.tar")).stat().st_size == 50_000


def test_a_full_disk_under_the_index_only_costs_the_index(small_disk: Path, tmp_path: Path) -> None:
    from multikd.data.index import read_index

    (shard,) = make_shards(tmp_path, [4])
    (small_disk / "filler").write_bytes(os.urandom(256 * 1024))
    (tmp_path / "link.tar").symlink_to(shard)
    moved = small_disk / "s.tar"
    moved.symlink_to(shard)
    assert len(read_index(moved)) == 4  # held in memory
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "s.tar"]
    assert len(read_index(moved, index_dir=tmp_path / "i")) == 4
    assert len(list((tmp_path / "i").iterdir())) == 1


def test_a_full_disk_under_the_writer_and_the_cache_of_features(
    small_disk: Path, tmp_path: Path
) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from multikd.data.cache import CacheSource, FeatureCacheWriter
    from multikd.data.writer import write_shards
    from multikd.types import TokenFeatures

    (tmp_path / "p").mkdir()
    noise = np.random.default_rng(0)
    for number in range(6):
        pixels = noise.integers(0, 256, (130, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "p" / f"{number}.png")
    out = small_disk / "out"
    with pytest.raises(OSError, match="No space left"):
        write_shards(tmp_path / "p", out, samples_per_shard=2)
    assert not list(out.glob("*tmp*"))
    kept = len((out / ".multikd-write.jsonl").read_text(encoding="utf-8").splitlines()) - 1
    assert kept in (1, 2)  # what was finished and noted stays
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    report = write_shards(tmp_path / "p", out, samples_per_shard=2)
    assert (report.kept_shards, report.total) == (kept, 6)
    example = TokenFeatures(summary=torch.zeros(1, 1 << 20))
    source = CacheSource("a", (10,), 1, {}, 0)
    with pytest.raises(ValueError, match="GB more and the disk has"):
        FeatureCacheWriter(small_disk / "f", source, {"vit": ("f", example)})
