"""A bounded local cache of files from http(s) servers: resumed, retried, least recently used out.

Only Python's own urllib is used; no shell, no subprocess.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.client
import logging
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from multikd.files import TEMPORARY_SUFFIX, file_lock
from multikd.redaction import redact
from multikd.untrusted import parse_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK = 1 << 20
_LONGEST_PAUSE = 30.0
_SLOWEST = 1024  # bytes a second, below which an answer counts as none
_MOST_UNSAID = 1 << 36  # bytes of an answer that does not say how long it is
_MANIFEST = "dataset.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # trying again does not help
_jitter = random.Random()  # its own: the run's random numbers are not for this
_OURS = re.compile(r"^[0-9a-f]{16}-")  # how ``path_of`` begins its names
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that a later try may not meet


def is_remote(url: str) -> bool:
    """Whether ``url`` is an http(s) address."""
    return url.lower().startswith(("http://", "https://"))


def public_name(url: str) -> str:
    """``url`` without user, password and query, which may hold secrets: for messages."""
    if not is_remote(url):
        return redact(url)
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class RemoteError(OSError):
    """A file that could not be fetched, after all retries."""

    def __init__(self, url: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"cannot fetch {public_name(url)}: {redact(reason)}")
        self.status = status


class RemoteCache:
    """Files fetched from http(s), kept under ``directory`` up to ``max_bytes``.

    Threads and processes may share a directory: one of them fetches, the others wait. A file that
    is being read may be evicted; who has it open can go on reading.

    Args:
        directory: made when it is first needed.
        max_bytes: bound of the sum of complete files; the newest one is always kept.
        timeout: seconds without an answer before a try is given up.
        retries: further tries after the first; each goes on where the last one stopped.
        pause: seconds before the first retry, doubled for each further one (30 at most), times
            0.5 to 1.5 by chance; longer where the server says ``Retry-After``.

    Where a ``dataset.json`` beside a shard tells its sha256 (as ``multikd shards write`` does),
    what comes must match it.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        *,
        timeout: float = 30.0,
        retries: int = 5,
        pause: float = 0.5,
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"the cache needs a bound above 0 bytes, received {max_bytes}")
        self.directory = directory
        self.max_bytes = max_bytes
        self.timeout = timeout
        self.retries = retries
        self.pause = pause
        self._manifests: dict[str, dict[str, tuple[int, str]]] = {}
        self._manifests_lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_manifests_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._manifests_lock = threading.Lock()

    def path_of(self, url: str) -> Path:
        """Where ``url`` is kept once it is fetched."""
        name = os.path.basename(urlsplit(url).path) or "file"
        return self.directory / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name[-100:]}"

    def fetch(self, url: str, *, wait: bool = True) -> Path:
        """The local copy of ``url``, fetched if needed.

        A copy that is there is trusted: a file at an address is taken never to change.

        Raises:
            RemoteError: it could not be fetched.
            BlockingIOError: ``wait`` is false and another thread or process is fetching it.
        """
        path = self.path_of(url)
        if _touch(path):
            return path
        self.directory.mkdir(parents=True, exist_ok=True)
        with file_lock(path.with_name(path.name + ".lock"), wait=wait):
            if _touch(path):  # somebody else fetched it while we waited
                return path
            part = path.with_name(path.name + TEMPORARY_SUFFIX)
            promised = self._promised(url)
            self._retrying(url, lambda: self._download_checked(url, part, promised))
            os.replace(part, path)
            _touch(path)
        self._evict(keep=path)
        return path

    def fetch_bytes(self, url: str, max_bytes: int = 1 << 28) -> bytes | None:
        """A small file as bytes, not kept; None where the server has none (404, 403, 410).

        Raises:
            RemoteError: for every other failure, or it is larger than ``max_bytes``.
        """

        def read() -> bytes:
            with self._open(url, {}) as response:
                expected = _length(response)
                data, watch = bytearray(), _Watch(self.timeout)
                while len(data) <= max_bytes and (part := response.read1(_CHUNK)):
                    data += part
                    watch.saw(len(part))
                if expected is not None and len(data) < min(expected, max_bytes):
                    raise ConnectionError("the connection ended early")
                return bytes(data)

        try:
            data = self._retrying(url, read)
        except RemoteError as error:
            if error.status in (403, 404, 410):
                return None
            raise
        if len(data) > max_bytes:
            raise RemoteError(url, f"it is larger than {max_bytes} bytes")
        return data

    def _retrying(self, url: str, work: Callable[[], T]) -> T:
        pause = self.pause
        for attempt in range(self.retries + 1):
            status: int | None = None
            asked = 0.0
            try:
                return work()
            except urllib.error.HTTPError as error:
                status, reason = error.code, f"HTTP {error.code} {error.reason}"
                asked = _retry_after(error)
                error.close()
                if status not in _PASSING:
                    raise RemoteError(url, reason, status) from error
            except http.client.InvalidURL as error:  # it quotes the address, secrets and all
                raise RemoteError(url, "it is no address that can be asked for") from error
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in _DISK:
                    raise RemoteError(url, f"{error.strerror} ({self.directory})") from error
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                # Without jitter, all workers of a cluster would come back at the same moment.
                wait = max(asked, pause * (0.5 + _jitter.random()))
                logger.info(
                    "%s: %s; trying again in %.1f s", public_name(url), redact(reason), wait
                )
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise RemoteError(url, f"{reason} ({self.retries + 1} tries)", status)

    def _open(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(
            urlunsplit(parts._replace(netloc=host, fragment="")),
            headers={"User-Agent": "multikd", **headers},
        )
        if user:  # urllib would take the password for a port, and say so in its message
            token = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        response: http.client.HTTPResponse = _opener.open(request, timeout=self.timeout)
        return response

    def _promised(self, url: str) -> tuple[int, str] | None:
        """Size and sha256 of a shard by the ``dataset.json`` beside it; None where it has none.

        A manifest that cannot be had or read promises nothing: it is a check, not a need.
        """
        parts = urlsplit(url)
        folder, _, name = parts.path.rpartition("/")
        beside = urlunsplit(parts._replace(path=f"{folder}/{_MANIFEST}"))
        if not name.endswith(".tar"):
            return None
        with self._manifests_lock:
            if beside not in self._manifests:
                self._manifests[beside] = self._manifest(beside)
            return self._manifests[beside].get(unquote(name))

    def _manifest(self, url: str) -> dict[str, tuple[int, str]]:
        quick = RemoteCache(self.directory, self.max_bytes, timeout=self.timeout, retries=1)
        try:
            data = quick.fetch_bytes(url, 1 << 26)
            shards = [] if data is None else parse_json(data, public_name(url))["shards"]
            return {
                str(shard["name"]): (int(shard["bytes"]), str(shard["sha256"]).lower())
                for shard in shards
                if re.fullmatch("[0-9a-fA-F]{64}", str(shard.get("sha256")))
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.info("%s: no checksums (%s)", public_name(url), redact(str(error)))
            return {}

    def _download_checked(self, url: str, part: Path, promised: tuple[int, str] | None) -> None:
        try:
            self._download(url, part)
        except OSError as error:
            if error.errno in _DISK:  # room for the others; a resumed download is worth less
                part.unlink(missing_ok=True)
                _note(part).unlink(missing_ok=True)
            raise
        if promised is None:
            return
        with part.open("rb") as file:
            found = (part.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        if found != promised:
            part.unlink(missing_ok=True)  # whatever is wrong with it, don't go on from it
            raise ConnectionError(
                f"it is not what {_MANIFEST} beside it promises: expected {promised[0]} bytes with "
                f"sha256 {promised[1][:12]}…, received {found[0]} with {found[1][:12]}…"
            )

    def _download(self, url: str, part: Path) -> None:
        """Fetch ``url`` into ``part``, going on after the bytes that are there.

        Resuming needs the server's validator of the first try (ETag or date), so that two
        versions of a file are never joined; it is kept beside ``part``.
        """
        note = _note(part)
        have = part.stat().st_size if part.exists() and note.exists() else 0
        headers = {"Range": f"bytes={have}-", "If-Range": note.read_text()} if have else {}
        try:
            response = self._open(url, headers)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing lies behind what we have: start over
                part.unlink(missing_ok=True)
                note.unlink(missing_ok=True)
                raise ConnectionError("the partial file does not fit: starting over") from error
            raise
        with response:
            resumed = response.status == 206
            if resumed and not _begins_at(response, have):
                part.unlink(missing_ok=True)
                note.unlink(missing_ok=True)
                raise ConnectionError("it answered with another range: starting over")
            length = _length(response)
            expected = None if length is None else length + (have if resumed else 0)
            validator = _validator(response)
            if validator:
                note.write_text(validator)
            else:
                note.unlink(missing_ok=True)
            received, watch = have if resumed else 0, _Watch(self.timeout)
            with part.open("ab" if resumed else "wb") as file:
                while chunk := response.read1(_CHUNK):
                    file.write(chunk)
                    received += len(chunk)
                    watch.saw(len(chunk))
                    if expected is None and received > _MOST_UNSAID:
                        raise RemoteError(url, f"more than {_MOST_UNSAID} bytes, and no length")
        if expected is not None and received != expected:
            raise ConnectionError(f"received {received} of {expected} bytes")
        note.unlink(missing_ok=True)

    def _evict(self, keep: Path) -> None:
        """Delete the least recently used complete files until the rest fits."""
        with file_lock(self.directory / ".evict.lock"):
            files = []
            for entry in os.scandir(self.directory):
                if entry.name.endswith((".lock", TEMPORARY_SUFFIX, "-validator")):
                    continue
                if not _OURS.match(entry.name):  # somebody's own file in the folder
                    continue
                with contextlib.suppress(OSError):  # another process may have deleted it
                    stat = entry.stat()
                    files.append((stat.st_mtime_ns, entry.path, stat.st_size))
            total = sum(size for _, _, size in files)
            for _, path, size in sorted(files):
                if total <= self.max_bytes:
                    break
                if path != str(keep):
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                    total -= size


class _Watch:
    """Gives up on an answer that trickles: a byte a minute keeps every time-out from firing.

    Args:
        timeout: seconds in which at least ``_SLOWEST`` bytes a second must come, on average.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._since, self._bytes = time.monotonic(), 0

    def saw(self, count: int) -> None:
        """Note that bytes came.

        Raises:
            TimeoutError: too few in the last stretch of time.
        """
        self._bytes += count
        elapsed = time.monotonic() - self._since
        if elapsed > self._timeout:
            if self._bytes < _SLOWEST * elapsed:
                raise TimeoutError(f"only {self._bytes} bytes in {elapsed:.0f} s")
            self._since, self._bytes = time.monotonic(), 0


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http(s) alone (urllib would follow one to ftp)."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """As urllib's, for addresses of the web."""
        if not is_remote(newurl):
            raise urllib.error.HTTPError(req.full_url, code, "it leads away from http", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_HttpOnly)


def _note(part: Path) -> Path:
    return part.with_name(part.name + "-validator")


def _length(response: http.client.HTTPResponse) -> int | None:
    """What ``Content-Length`` says, where it says a number."""
    said: str = response.headers.get("Content-Length", "")
    return int(said) if said.isascii() and said.isdigit() and len(said) < 19 else None


def _begins_at(response: http.client.HTTPResponse, offset: int) -> bool:
    said: str = response.headers.get("Content-Range", "")
    match = re.match(r"bytes (\d{1,18})-", said)
    return match is None or int(match[1]) == offset  # not all servers say


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds for which a busy server asks to be left alone, within reason."""
    said = "" if error.headers is None else str(error.headers.get("Retry-After", ""))
    return min(float(said), _LONGEST_PAUSE) if said.isdigit() and len(said) < 9 else 0.0


def _validator(response: http.client.HTTPResponse) -> str:
    tag: str = response.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):  # a weak tag does not promise the same bytes
        return tag
    return str(response.headers.get("Last-Modified", ""))


def _touch(path: Path) -> bool:
    """Mark ``path`` as just used; False where it is not there."""
    try:
        os.utime(path)
    except OSError:
        return False
    return True
