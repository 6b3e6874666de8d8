"""A small http server of a folder, for tests of remote shards."""

from __future__ import annotations

import http.server
import re
import threading
from pathlib import Path
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, counts requests, and misbehaves on demand."""

    daemon_threads = True
    root: Path
    requests: list[tuple[str, str]]  # path, Range header
    failures: dict[str, list[int | str]]  # path → first: a status, or "cut", "hang" or "wait"
    ranges: bool = True
    etag: str = '"1"'
    authorization: str = ""  # of the last request
    manifests: int = 0  # requests for a dataset.json, which are not among ``requests``

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.released = threading.Event()  # ends what hangs or waits

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
        if path.endswith("/dataset.json"):  # looked for once by every process
            self.server.manifests += 1
        else:
            self.server.requests.append((path, header))
        self.server.authorization = self.headers.get("Authorization", "")
        todo = self.server.failures.get(path) or [200]
        act = todo.pop(0)
        file = self.server.root / path.lstrip("/")
        if act == "wait":  # until the test says so
            self.server.released.wait(60.0)
            act = 200
        if act == "hang":
            self.server.released.wait(1.0)
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
