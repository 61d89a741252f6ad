"""Download files over HTTPS: complete or not at all, with retries, several at a time."""

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

from data_prep.sources.remote import redacted
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic

#: Attempts per file; pause in seconds before the second one (doubled each time); seconds without
#: data that end an attempt.
TRIES, PAUSE_S, TIMEOUT_S = 5, 1.0, 60.0
CHUNK = 1 << 20


class NotThere(InputError):
    """The server does not have the file."""


def download_if_there(url: str, path: Path) -> int | None:
    """Download a file; return its size in bytes, or None if the server does not have it."""
    try:
        return download(url, path)
    except NotThere:
        return None


def download(url: str, path: Path) -> int:
    """Download a file, with retries after temporary failures; return its size in bytes.

    The file appears under its final name only when it is complete.

    Raises:
        NotThere: The server does not have the file.
        InputError: The request was refused, or all attempts failed.
    """
    pause = PAUSE_S
    for attempt in range(1, TRIES + 1):
        try:
            with (
                urllib.request.urlopen(url, timeout=TIMEOUT_S) as response,
                atomic(path) as temporary,
            ):
                return _copy(response, temporary)
        except urllib.error.HTTPError as error:
            error.close()  # also closes the response
            reason = f"HTTP {error.code}"
            # Permanent failures. All other codes, such as 503, are tried again.
            if error.code in (400, 401, 403, 404, 410):
                kind = NotThere if error.code in (404, 410) else InputError
                raise kind(
                    f"{redacted(url)}: cannot be downloaded ({reason}); check --accession, "
                    "--source, --batch and --plate"
                ) from error
        except (http.client.InvalidURL, ValueError) as error:  # such as a password with ":" or "@"
            raise InputError(
                f"{redacted(url)}: is not a valid URL ({redacted(str(error))}); check the base URL"
            ) from error
        except (OSError, EOFError, http.client.HTTPException) as error:
            reason = redacted(str(getattr(error, "reason", error)))
        if attempt < TRIES:
            time.sleep(pause)
            pause *= 2
    raise InputError(
        f"{redacted(url)}: cannot be downloaded after {TRIES} attempts ({reason}); run the same "
        "command again to resume"
    )


def _copy(response: Any, path: Path) -> int:
    """Write a response to a file, and check its size against Content-Length."""
    expected = response.headers.get("Content-Length")
    with open(path, "wb") as file:
        while chunk := _read(response):
            file.write(chunk)
        size = file.tell()
    # A broken connection can end a response early without an error.
    if expected is not None and str(size) != expected.strip():
        raise EOFError(f"received {size} of {expected} bytes")
    return size


def _read(response: Any) -> bytes:
    try:
        return response.read(CHUNK)
    except (
        OSError,
        http.client.HTTPException,
    ) as error:  # EOFError, because OSError also means a full disk
        raise EOFError(f"the connection broke: {error}") from error


def in_parallel(function: Callable[[Any], Any], items: Any, threads: int) -> Iterator[Any]:
    """Yield results in order; at most four items per thread are pending. A failure ends it."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future] = deque()
        try:
            for item in items:
                # Wait for the oldest item, which limits the memory.
                if len(pending) >= 4 * threads:
                    yield pending.popleft().result()
                pending.append(pool.submit(function, item))
            while pending:
                yield pending.popleft().result()
        except BaseException:
            for future in pending:
                future.cancel()
            raise
