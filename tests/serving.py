"""A web server on this machine whose answers a test scripts."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with ETags and ranges; functions in `script` answer the first requests instead.

    Attributes:
        address: "http://127.0.0.1:PORT".
        files: name -> content.
        script: functions of (handler, content of the file or None), each used once, in order.
        ranges: the Range header of every request, "" without one.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.script: list[Callable[[_Handler, bytes | None], None]] = []
        self.ranges: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range", ""))
        content = self.server.files.get(self.path.removeprefix("/"))
        if self.server.script:
            self.server.script.pop(0)(self, content)
        elif content is None:
            self.send_error(404)
        else:
            self.serve(content)

    def serve(self, content: bytes, stop: int | None = None, tag: bool = True) -> None:
        """Answer with a file, or with what the Range header asks for; break off after `stop` bytes of it."""
        name = f'"{hashlib.sha256(content).hexdigest()}"'
        start = 0
        if self.headers.get("Range") and self.headers.get("If-Range", name) == name:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if tag:
            self.send_header("ETag", name)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:stop])
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Silent."""


def breaks_after(stop: int, tag: bool = True) -> Callable[[_Handler, bytes | None], None]:
    """An answer whose connection ends after byte `stop` of the file."""
    return lambda handler, content: handler.serve(content, stop, tag)


def says(code: int) -> Callable[[_Handler, bytes | None], None]:
    """An answer with an HTTP status and no file."""
    return lambda handler, content: handler.send_error(code)


@contextmanager
def running() -> Iterator[Server]:
    """A server in a thread of its own."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
