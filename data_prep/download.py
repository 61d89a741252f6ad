"""Download files over HTTPS: complete or not at all, with retries, several at a time."""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.connections import TIMEOUT, redacted, time_limit
from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic
from perturbjax.core.messages import console

#: Attempts per file; pause in seconds before the second one (doubled each time); seconds without
#: data that end an attempt.
TRIES, PAUSE_S, SILENCE_S = 5, 1.0, 30.0
CHUNK = 1 << 20
#: Interval in seconds at which a slow download is reported.
REPORT_S = 30.0


class NotThere(InputError):
    """The server does not have the file."""


def download_if_there(url: str, path: Path, most: int) -> int | None:
    """Download a file; return its size in bytes, or None if the server does not have it."""
    try:
        return download(url, path, most)
    except NotThere:
        return None


def download(url: str, path: Path, most: int, since: float | None = None) -> int:
    """Download a file, with retries after temporary failures; return its size in bytes.

    The file appears under its final name only when it is complete.

    Args:
        url: Address of the file.
        path: File to write.
        most: Maximum size in bytes; the download ends there.
        since: `time.monotonic()` at the start of the time limit, if several requests share it; by
            default now.

    Raises:
        NotThere: The server does not have the file.
        InputError: The request was refused, the file is too large, the time is over, or all
            attempts failed.
    """
    pause = PAUSE_S
    transfer = _Transfer(url, most, since or time.monotonic(), time_limit())
    transfer.require_time()
    for attempt in range(1, TRIES + 1):
        try:
            with (
                transfer.open() as response,
                atomic(path) as temporary,
            ):
                return transfer.copy(response, temporary)
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
        transfer.require_time()
        if attempt < TRIES:
            time.sleep(min(pause, transfer.remaining()))
            pause *= 2
    raise InputError(
        f"{redacted(url)}: cannot be downloaded after {TRIES} attempts ({reason}); run the same "
        "command again to resume"
    )


@dataclass(frozen=True)
class _Transfer:
    """Limits of one download."""

    url: str
    most: int
    start: float
    limit: float

    def remaining(self) -> float:
        """Return the remaining time in seconds."""
        return max(self.limit - (time.monotonic() - self.start), 0.01)

    def open(self) -> Any:
        """Send the request, and return the response when its headers have arrived.

        A thread waits for them, because a server can send them byte by byte.
        """
        answer: Future = Future()

        def wait() -> None:
            try:
                silence = min(SILENCE_S, self.remaining())
                answer.set_result(urllib.request.urlopen(self.url, timeout=silence))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        return answer.result(self.remaining())

    def require_time(self) -> None:
        """Raise InputError if the time is over."""
        if time.monotonic() - self.start >= self.limit:
            raise InputError(
                f"{redacted(self.url)}: was not received within {self.limit:g} s; run the same "
                f"command again to resume, or set {TIMEOUT} to more seconds"
            )

    def copy(self, response: Any, path: Path) -> int:
        """Write a response to a file, and check its size against Content-Length."""
        expected = response.headers.get("Content-Length", "").strip()
        if expected.isdecimal():
            self._require_size(int(expected[:20]))
        report = REPORT_S
        with open(path, "wb") as file:
            while chunk := _read(response):
                file.write(chunk)
                self._require_size(size := file.tell())
                self.require_time()
                if (elapsed := time.monotonic() - self.start) > report:
                    report = elapsed + REPORT_S
                    console.print(
                        f"info: {redacted(self.url)}: {size / 1e6:.1f} MB received "
                        f"({elapsed:.0f} of {self.limit:g} s)"
                    )
            size = file.tell()
        # A broken connection can end a response early without an error.
        if expected and str(size) != expected:
            raise EOFError(f"received {size} of {expected[:20]} bytes")
        return size

    def _require_size(self, size: int) -> None:
        if size > self.most:
            raise InputError(
                f"{redacted(self.url)}: has more than the allowed {self.most} bytes; check the "
                "server"
            )


def _read(response: Any) -> bytes:
    """Read what has arrived, so that a slow server does not block until a whole chunk is there."""
    try:
        return response.read1(CHUNK)
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
