"""Read objects in S3 and files behind HTTPS through obstore, without copies on the local disk.

Requests are signed if the environment has credentials (`AWS_ACCESS_KEY_ID` or `AWS_PROFILE`; see
also `AWS_REGION` and `AWS_ENDPOINT_URL`); public buckets need none. Requests are repeated after
temporary failures (broken connection, busy or silent server), within the time limit of an object.
Permanent failures (missing object, no permission) end in one line.

A server can declare any size and send any number of bytes. Objects are therefore received in
pieces, and a download ends at its maximum size.
"""

from __future__ import annotations

import asyncio
import functools
import io
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from data_prep.sources.connections import (
    TIMEOUT,
    connection_settings,
    describe,
    environment,
    is_remote,
    redacted,
    split_url,
    time_limit,
)
from data_prep.sources.object_store import ListingError, connect, list_folder
from perturbjax.core.errors import InputError
from perturbjax.core.messages import console

__all__ = ["is_remote", "redacted"]

T = TypeVar("T")
#: Time limit in seconds without data.
SILENCE_S = 30.0
#: Attempts for an object whose download breaks off midway; obstore does not repeat these.
TRIES = 3
#: Size of a request in bytes if only the header is needed, and of a received piece.
HEADER_BYTES = PIECE_BYTES = 1 << 16


def open_remote(file: str, where: str, most: int, header: bool = False) -> io.BufferedIOBase:
    """Open an object for reading and seeking.

    Args:
        file: URL.
        where: Table and row, for messages.
        most: Maximum size in bytes.
        header: Read small pieces on demand instead of the whole object.

    Raises:
        InputError: The object is missing, too large, not readable, or all attempts failed.
    """
    if header:
        size = _run(file, where, _request(file, where, _size))
        _require_size(size, most, file, where)
        # Small objects are faster as one request.
        if size > HEADER_BYTES:
            return io.BufferedReader(_Pieces(file, where, size), HEADER_BYTES)
    return io.BytesIO(_whole(file, where, most))


def names_of_prefix(folder: str, where: str) -> list[str]:
    """Return the names directly below a prefix of a bucket; none for HTTPS, which has no listing.

    Raises:
        InputError: No permission to list the bucket, the listing is too large or takes too long,
            or all attempts failed.
    """
    if not folder.startswith("s3://"):
        return []
    _require_obstore(folder, where)
    origin, key = split_url(folder)
    limit = time_limit()

    def report(elapsed: float) -> None:
        console.print(f"info: listing {redacted(folder)} ({elapsed:.0f} of {limit:g} s)")

    try:
        return list_folder(connection_settings(origin), key, limit, report)
    except TimeoutError as error:
        raise InputError(f"{where}: {redacted(folder)} {_too_slow(limit)}") from error
    except ListingError as error:
        raise InputError(f"{where}: {redacted(folder)} {describe(*error.args)}") from error


def exists(file: str, where: str) -> bool:
    """Return whether an object exists.

    Raises:
        InputError: No permission, or all attempts failed.
    """
    return _run(file, where, exists_async(file, where))


async def exists_async(file: str, where: str) -> bool:
    """Return whether an object exists; see `exists`."""
    try:
        await _request(file, where, _size)
    except FileNotFoundError:
        return False
    return True


async def read_async(
    file: str, where: str, most: int, bounds: tuple[int, int | None] | None = None
) -> bytes | None:
    """Return the bytes of an object, or None if it does not exist.

    Args:
        file: URL.
        where: Table and row, for messages.
        most: Maximum number of bytes.
        bounds: (start, end) of a range; a negative start counts from the end of the object.

    Raises:
        InputError: The object is too large, not readable, or all attempts failed.
    """
    receive = functools.partial(_receive, file=file, where=where, most=most, bounds=bounds)
    try:
        return await _request(file, where, receive)
    except FileNotFoundError:
        return None


async def _receive(
    store: Any,
    key: str,
    *,
    file: str,
    where: str,
    most: int,
    bounds: tuple[int, int | None] | None,
) -> bytes:
    options: dict[str, Any] = {}
    if bounds is not None:
        start, end = bounds
        options["range"] = {"suffix": -start} if start < 0 else {"offset": start}
        if end is not None:
            options["range"], most = (start, end), min(most, end - start)
    response = await _within(_obstore().get_async(store, key, options=options))
    if bounds is None:
        _require_size(response.meta["size"], most, file, where)
    content = bytearray()
    pieces = aiter(response.stream(min_chunk_size=PIECE_BYTES))
    try:
        while (piece := await _within(anext(pieces, None))) is not None:
            content += memoryview(piece)
            _require_size(len(content), most, file, where)
    except (InputError, TimeoutError):
        raise
    except Exception as error:  # obstore raises many types
        raise _BrokenOff(str(error)) from error
    return bytes(content)


class _BrokenOff(Exception):
    """A download ended early."""


async def _size(store: Any, key: str) -> int:
    return cast(int, (await _within(_obstore().head_async(store, key)))["size"])


async def _within(awaitable: Awaitable[T]) -> T:
    """Wait for an answer or a piece of it; a silent server raises `TimeoutError`."""
    return await asyncio.wait_for(awaitable, min(SILENCE_S, time_limit()))


async def _request(
    url: str, where: str, function: Callable[[Any, str], Coroutine[Any, Any, T]]
) -> T:
    """Return `function(store, key)` for a URL, with several attempts within the time limit.

    Args:
        url: URL of the object.
        where: Table and row, for messages.
        function: Request; must be repeatable.

    Raises:
        FileNotFoundError: The object does not exist.
        InputError: One line for any other failure.
    """
    _require_obstore(url, where)
    origin, key = split_url(url)
    start, limit = time.monotonic(), time_limit()
    for attempt in range(1, TRIES + 1):
        try:
            remaining = max(limit - (time.monotonic() - start), 0.001)
            store = _store(origin, environment())
            return await asyncio.wait_for(function(store, key), remaining)
        except (InputError, FileNotFoundError):
            raise
        except BaseException as error:  # obstore raises many types
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            elapsed = time.monotonic() - start
            if elapsed >= limit:
                raise InputError(f"{where}: {redacted(url)} {_too_slow(limit)}") from error
            # obstore repeats requests without an answer, but not downloads that break off.
            if attempt == TRIES or not isinstance(error, TimeoutError | _BrokenOff):
                raise InputError(f"{where}: {redacted(url)} {reason(error)}") from error
            console.print(
                f"info: {redacted(url)}: {_problem(error)}; attempt {attempt + 1} of {TRIES} "
                f"({elapsed:.0f} of {limit:g} s)"
            )
    raise AssertionError


def _problem(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no data for {min(SILENCE_S, time_limit()):g} s"
    return "the download broke off"


def _too_slow(limit: float) -> str:
    return (
        f"was not received within {limit:g} s; the server is silent or slow. Run the same "
        f"command again to resume, or set {TIMEOUT} to more seconds"
    )


def _require_size(size: int, most: int, file: str, where: str) -> None:
    if size > most:
        raise InputError(
            f"{where}: {redacted(file)} has {size} bytes, too many for one plane (at most {most}); "
            "tile it"
        )


def _run(file: str, where: str, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in a new thread, because notebooks run an event loop in theirs."""
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(asyncio.run, coroutine).result()
    except FileNotFoundError as error:
        raise InputError(f"{where}: {redacted(file)} does not exist") from error


def reason(error: BaseException) -> str:
    """Describe a failed request and its remedy in a few words that follow the URL."""
    if isinstance(error, TimeoutError):
        return f"cannot be read ({_problem(error)}, {TRIES} times); check the server"
    return describe(type(error).__name__, str(error))


class _Pieces(io.RawIOBase):
    """Read an object by byte ranges; as a whole if the server does not support ranges."""

    def __init__(self, file: str, where: str, size: int):
        self.file, self.where, self.size, self.position = file, where, size, 0
        self.whole: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        # Reference position of the offset.
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        end = min(self.position + len(buffer), self.size)
        if end <= self.position:
            return 0
        piece = self._piece(end)
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)

    def _piece(self, end: int) -> bytes:
        bounds = (self.position, end)
        if self.whole is None:
            receive = functools.partial(
                _receive, file=self.file, where=self.where, most=self.size, bounds=bounds
            )
            request = _request(self.file, self.where, _if_supported(receive))
            piece = _run(self.file, self.where, request)
            if piece is not None:
                return piece
            # The server supports no ranges: download the object once, and answer later reads from
            # memory.
            self.whole = _whole(self.file, self.where, self.size)
        return self.whole[self.position : end]


def _if_supported(receive: Callable[[Any, str], Awaitable[bytes]]) -> Any:
    """Change a request of a range: it returns None if the server does not support ranges."""

    async def receive_range(store: Any, key: str) -> bytes | None:
        try:
            return await receive(store, key)
        except Exception as error:
            if type(error).__name__ != "NotSupportedError":
                raise
            return None

    return receive_range


def _whole(file: str, where: str, most: int) -> bytes:
    """Return all bytes of an object of at most `most` bytes."""
    receive = functools.partial(_receive, file=file, where=where, most=most, bounds=None)
    return _run(file, where, _request(file, where, receive))


@functools.lru_cache(maxsize=64)
def _store(root: str, _: tuple[str, ...]) -> Any:
    """Connect to a bucket or a server; connections are reused."""
    return connect(connection_settings(root))


def _obstore() -> Any:
    import obstore

    return obstore


def _require_obstore(url: str, where: str) -> None:
    try:
        _obstore()
    except ImportError as error:
        raise InputError(
            f'{where}: reading {redacted(url)} requires: pip install "perturbjax[remote]"'
        ) from error
