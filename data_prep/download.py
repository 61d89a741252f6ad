"""Files over HTTPS: each whole or not at all, tried again after what may pass, several at a time."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic

#: Tries for each file, seconds before the second one (doubled each time), seconds without a byte that end a try.
TRIES, PAUSE_S, TIMEOUT_S = 5, 1.0, 60.0
CHUNK = 1 << 20


class NotThere(InputError):
    """The server has no such file: other names may be tried, or it is done without."""


def download_if_there(url: str, path: Path) -> int | None:
    """Fetch a file that may be missing there: its bytes, or None."""
    try:
        return download(url, path)
    except NotThere:
        return None


def download(url: str, path: Path) -> int:
    """Fetch a file under its final name, whole or not at all; tries again after what may pass. Its bytes.

    Raises:
        InputError: there is no such file, or no try succeeded.
    """
    pause = PAUSE_S
    for attempt in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply, atomic(path) as temporary:
                return _copy(reply, temporary)
        except urllib.error.HTTPError as error:
            error.close()  # it is the reply, too
            reason = f"HTTP {error.code}"
            if error.code in (400, 401, 403, 404, 410):
                kind = NotThere if error.code in (404, 410) else InputError
                raise kind(
                    f"{url}: cannot be fetched ({reason}); check --accession, --source, --batch and --plate"
                ) from error
        except (OSError, EOFError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error))
        if attempt < TRIES:
            time.sleep(pause)
            pause *= 2
    raise InputError(
        f"{url}: cannot be fetched after {TRIES} tries ({reason}); run the same command again to go on"
    )


def _copy(reply, path: Path) -> int:
    """Write a reply to a file and hold it to the length it announced."""
    announced = reply.headers.get("Content-Length")
    with open(path, "wb") as file:
        while chunk := _read(reply):
            file.write(chunk)
        size = file.tell()
    if announced is not None and str(size) != announced.strip():
        raise EOFError(f"{size} of {announced} bytes came")
    return size


def _read(reply) -> bytes:
    try:
        return reply.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:  # told apart from a disk that is full
        raise EOFError(f"the connection broke: {error}") from error


def in_parallel(function: Callable[[Any], Any], items: Any, threads: int) -> Iterator[Any]:
    """Results in order, a bounded number of items ahead; the first failure ends it."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future] = deque()
        try:
            for item in items:
                if len(pending) >= 4 * threads:
                    yield pending.popleft().result()
                pending.append(pool.submit(function, item))
            while pending:
                yield pending.popleft().result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise
