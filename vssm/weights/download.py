"""Downloads that survive broken connections: what came is kept and continued, and the file appears only when whole."""

from __future__ import annotations

import errno
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

_STEP = 1 << 20
_TIMEOUT_S = 30
_ATTEMPTS = 4
_PAUSE_S = 1.0
# What is said by a server that may be well a moment later.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
# Weights are never pages; log-ins, warnings and captive portals are.
_PAGES = ("text/html", "application/xhtml+xml")


class DownloadError(OSError):
    """A file could not be downloaded; the message says why, in part of a sentence."""


class _Broken(Exception):
    """It did not work this time and may the next; what came is kept."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from an encrypted connection to another kind of one."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"the server redirects from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, path: Path, check: Callable[[Path], None] = lambda path: None) -> None:
    """Download `url` to `path`, continuing what an earlier call or a broken connection left in PATH.partial.

    A part is continued only if the server gave its state a name (ETag or Last-Modified) and still has that state;
    otherwise the download starts anew. While the connection breaks, four attempts are made.

    Args:
        url: http or https; redirects are followed.
        path: appears when all has come and is checked, in one step.
        check: called with the whole file; if it raises, the file is removed.

    Raises:
        DownloadError: refused by the server, no connection, a page instead of a file, or no space left.
        OSError: the folder cannot be written to.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError("only http and https addresses are downloaded")
    partial, state = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.state")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _attempt(url, partial, state)
            break
        except _Broken as error:
            if attempt == _ATTEMPTS:
                raise DownloadError(f"{error}, {_ATTEMPTS} times; what came is kept, call again to continue") from None
            time.sleep(_PAUSE_S * attempt)
    try:
        check(partial)
    except BaseException:
        _forget(partial, state)
        raise
    os.replace(partial, path)
    _forget(state)


def _attempt(url: str, partial: Path, state: Path) -> None:
    """One connection, after which the partial file is whole; raises _Broken where another one may help."""
    request = urllib.request.Request(url, headers={"User-Agent": "vssm", "Accept-Encoding": "identity"})
    known = state.read_text(encoding="utf-8") if state.exists() and partial.exists() else ""
    done = partial.stat().st_size if known else 0
    if done:
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", known)
    try:
        answer = urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if error.headers.get("Content-Range") == f"bytes */{done}":
                return
            _forget(partial, state)
        elif error.code not in _PASSING:
            raise DownloadError(f"the server says HTTP {error.code} {error.reason}") from None
        raise _Broken(f"the server says HTTP {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise DownloadError(f"no connection: {error.reason}") from None
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _Broken(f"no answer: {error or type(error).__name__}") from None
    with answer:
        _receive(answer, partial, state, done)


def _receive(answer: http.client.HTTPResponse, partial: Path, state: Path, done: int) -> None:
    """What the server sends goes to the end of the first `done` bytes, or replaces them if it sends all."""
    if answer.headers.get_content_type() in _PAGES:
        raise DownloadError("the server sends a web page instead of the file")
    if answer.status != HTTPStatus.PARTIAL_CONTENT:
        done = 0
    elif not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
        _forget(partial, state)
        raise _Broken("the server sends another part than was asked for")
    length = answer.headers.get("Content-Length")
    total = done + int(length) if length else None
    if total is not None and shutil.disk_usage(partial.parent).free < total - done:
        raise _no_space(partial, f" for {(total - done) / 1e6:.1f} MB")
    with partial.open("ab" if done else "wb") as stream:
        # named only now that a part of an older state is gone
        _remember(state, answer.headers)
        try:
            done = _copy(answer, stream, done, total)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            raise _Broken(f"the connection broke: {error or type(error).__name__}") from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _no_space(partial) from None
    if total is not None and done < total:
        raise _Broken(f"the connection broke after {done} of {total} bytes")


def _copy(answer: http.client.HTTPResponse, stream: BinaryIO, done: int, total: int | None) -> int:
    """The rest of the answer into the file; returns how many bytes the file then has."""
    name = Path(stream.name).stem
    # None: a bar on terminals only
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024, desc=name, disable=None) as bar:
        while block := answer.read(_STEP):
            stream.write(block)
            done += len(block)
            bar.update(len(block))
        stream.flush()
        os.fsync(stream.fileno())
    return done


def _no_space(partial: Path, needed: str = "") -> DownloadError:
    return DownloadError(f"no space left{needed} in {partial.parent}; free some, or choose another folder")


def _remember(state: Path, headers: Message) -> None:
    """Keep the name of the file's state: a strong ETag, else the time of its last change."""
    tag = headers.get("ETag", "")
    name = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    if name:
        state.write_text(name, encoding="utf-8")
    else:
        _forget(state)


def _forget(*paths: Path) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()
