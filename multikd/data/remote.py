"""A bounded local cache of files from http(s) servers: resumed, retried, least recently used out.

Only Python's own urllib is used; no shell, no subprocess.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from multikd.files import TEMPORARY_SUFFIX, file_lock

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK = 1 << 20
_LONGEST_PAUSE = 30.0
_OURS = re.compile(r"^[0-9a-f]{16}-")  # how ``path_of`` begins its names
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that a later try may not meet


def is_remote(url: str) -> bool:
    """Whether ``url`` is an http(s) address."""
    return url.lower().startswith(("http://", "https://"))


def public_name(url: str) -> str:
    """``url`` without user, password and query, which may hold secrets: for messages."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class RemoteError(OSError):
    """A file that could not be fetched, after all retries."""

    def __init__(self, url: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"cannot fetch {public_name(url)}: {reason}")
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
        pause: seconds before the first retry, doubled for each further one (30 at most).
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
            self._retrying(url, lambda: self._download(url, part))
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
                expected = response.headers.get("Content-Length")
                data: bytes = response.read(max_bytes + 1)
                if expected is not None and len(data) < min(int(expected), max_bytes):
                    raise ConnectionError("the connection ended early")
                return data

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
            try:
                return work()
            except urllib.error.HTTPError as error:
                status, reason = error.code, f"HTTP {error.code} {error.reason}"
                error.close()
                if status not in _PASSING:
                    raise RemoteError(url, reason, status) from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                logger.info("%s: %s; trying again in %.1f s", public_name(url), reason, pause)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise RemoteError(url, f"{reason} ({self.retries + 1} tries)", status)

    def _open(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(
            urlunsplit(parts._replace(netloc=host)), headers={"User-Agent": "multikd", **headers}
        )
        if user:  # urllib would take the password for a port, and say so in its message
            token = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=self.timeout)
        return response

    def _download(self, url: str, part: Path) -> None:
        """Fetch ``url`` into ``part``, going on after the bytes that are there.

        Resuming needs the server's validator of the first try (ETag or date), so that two
        versions of a file are never joined; it is kept beside ``part``.
        """
        note = part.with_name(part.name + "-validator")
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
            length = response.headers.get("Content-Length")
            validator = _validator(response)
            if validator:
                note.write_text(validator)
            else:
                note.unlink(missing_ok=True)
            with part.open("ab" if resumed else "wb") as file:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
        expected = None if length is None else int(length) + (have if resumed else 0)
        received = part.stat().st_size
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
