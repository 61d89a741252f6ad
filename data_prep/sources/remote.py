"""Read objects in S3 and files behind HTTPS through obstore, without copies on the local disk.

Requests are signed if the environment has credentials (`AWS_ACCESS_KEY_ID` or `AWS_PROFILE`; see
also `AWS_REGION` and `AWS_ENDPOINT_URL`); public buckets need none. obstore repeats requests after
temporary failures (broken connection, busy server) with growing pauses. Permanent failures (missing
object, no permission) end in one line.
"""

from __future__ import annotations

import functools
import io
import os
import re
from datetime import timedelta
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from perturbjax.core.errors import InputError

SCHEME = re.compile("(s3|https?)://")
#: Time limits in seconds for a connection and for one response; number of retries of a request and
#: their time limit in seconds.
CONNECT_S, ANSWER_S, RETRIES, RETRY_S = 10, 120, 5, 180
#: Size of a request in bytes if only the header is needed.
HEADER_BYTES = 1 << 16
#: Attempts for an object whose download breaks off midway; obstore does not repeat these.
TRIES = 3
#: Environment variables with AWS credentials. Requests are not signed if none is set.
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_USER = re.compile(r"(?<=://)[^/\s]+@")
_SECRET = re.compile(r"(?i)(?<=[?&])((?:x-amz-[a-z-]*|token|sig|signature|key|password)=)[^&\s]+")


def is_remote(path: str) -> bool:
    """Return whether a path is a URL of a supported scheme."""
    return bool(SCHEME.match(path))


def redacted(text: str) -> str:
    """Replace user names, passwords and signatures in URLs by `***`, for messages."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


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
        size = cast(
            int, request(file, where, lambda store, key: _obstore().head(store, key)["size"])
        )
        # Small objects are faster as one request.
        if size > HEADER_BYTES:
            return io.BufferedReader(_Pieces(file, where, size), HEADER_BYTES)
    return io.BytesIO(_whole(file, where, most))


def names_of_prefix(folder: str, where: str) -> list[str]:
    """Return the names directly below a prefix of a bucket; none for HTTPS, which has no listing.

    Raises:
        InputError: No permission to list the bucket, or all attempts failed.
    """
    if not folder.startswith("s3://"):
        return []

    def list_keys(store: Any, key: str) -> list[str]:
        # Folders are common prefixes of keys; objects are the files.
        page = _obstore().list_with_delimiter(store, prefix=key.strip("/") or None)
        return [*page["common_prefixes"], *(entry["path"] for entry in page["objects"])]

    return [key.rstrip("/").rpartition("/")[2] for key in request(folder, where, list_keys)]


def exists(file: str, where: str) -> bool:
    """Return whether an object exists.

    Raises:
        InputError: No permission, or all attempts failed.
    """

    def head(store: Any, key: str) -> bool:
        try:
            _obstore().head(store, key)
        except FileNotFoundError:
            return False
        return True

    return cast(bool, request(file, where, head))


def remote_zarr(root: str, where: str) -> Any:
    """Return a zarr-python store below a URL."""
    from zarr.storage import ObjectStore

    _require_obstore(root, where)
    return ObjectStore(_store(root, _environment()), read_only=True)


def request(url: str, where: str, function: Any) -> Any:
    """Return `function(store, key)` for the store and key of a URL.

    Raises:
        InputError: One line for any failure.
    """
    _require_obstore(url, where)
    origin, key = _split(url)
    try:
        return function(_store(origin, _environment()), key)
    except InputError:
        raise
    except Exception as error:  # obstore raises many types
        raise InputError(f"{where}: {redacted(url)} {reason(error)}") from error


def reason(error: Exception) -> str:
    """Describe a failed request and its remedy in a few words that follow the URL."""
    text = redacted(str(error))
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError") or re.search(
        r"\b40[13] ", text
    ):
        signed = (
            "the credentials in the environment were refused"
            if _has_credentials()
            else "no credentials in the environment"
        )
        return (
            f"cannot be read: no permission ({signed}); set AWS_ACCESS_KEY_ID and its secret, or "
            "unset them for a public bucket"
        )
    if "redirect" in text.lower() or re.search(r"\b30[1278] ", text):
        return (
            f"is redirected: the bucket is in another region than {_region()}; set AWS_REGION to "
            "the region of the bucket"
        )
    line = text.splitlines()[0][:300] if text else type(error).__name__
    return f"cannot be read ({line}); run the same command again to resume"


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
        def read_range(store: Any, key: str) -> bytes | None:
            try:
                return bytes(_obstore().get_range(store, key, start=self.position, end=end))
            except Exception as error:
                if type(error).__name__ != "NotSupportedError":
                    raise
                return None

        if self.whole is None:
            piece = cast("bytes | None", request(self.file, self.where, read_range))
            if piece is not None:
                return piece
            # The server supports no ranges: download the object once, and answer later reads from
            # memory.
            self.whole = _whole(self.file, self.where, self.size)
        return self.whole[self.position : end]


def _whole(file: str, where: str, most: int) -> bytes:
    """Return all bytes of an object of at most `most` bytes."""

    def read_object(store: Any, key: str) -> bytes:
        # obstore repeats failed requests, but not downloads that break off midway.
        for attempt in range(1, TRIES + 1):
            response = _obstore().get(store, key)
            if (size := response.meta["size"]) > most:
                raise InputError(
                    f"{where}: {redacted(file)} has {size} bytes, too many for one plane; tile it"
                )
            try:
                return bytes(response.bytes())
            except Exception:
                if attempt == TRIES:
                    raise
        raise AssertionError

    return cast(bytes, request(file, where, read_object))


def _split(url: str) -> tuple[str, str]:
    """Split a URL into bucket or server, and key."""
    parts = urlsplit(url)
    if not parts.netloc:
        raise InputError(f"{url}: the {'bucket' if parts.scheme == 's3' else 'server'} is missing")
    # Keys in S3 can contain percent signs; URLs of servers are percent-encoded.
    path = parts.path if parts.scheme == "s3" else unquote(parts.path)
    return f"{parts.scheme}://{parts.netloc}", path.strip("/")


def _has_credentials() -> bool:
    return any(os.environ.get(name) for name in CREDENTIALS)


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _environment() -> tuple[str, ...]:
    """Return the environment variables that a connection depends on, as a cache key."""
    return (_region(), *(os.environ.get(name, "") for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")))


@functools.lru_cache(maxsize=64)
def _store(root: str, _: tuple[str, ...]) -> Any:
    """Connect to a bucket or a server; connections are reused."""
    from obstore.store import HTTPStore, S3Store

    settings: Any = {
        "client_options": {
            "allow_http": True,  # for local servers; AWS_ENDPOINT_URL receives the credentials
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(seconds=ANSWER_S),
        },
        "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
    }
    origin, key = _split(root)
    if not origin.startswith("s3://"):
        return HTTPStore.from_url(root, **settings)
    if os.environ.get("AWS_PROFILE"):
        # obstore does not read AWS profiles.
        settings["credential_provider"] = _profile_credentials()
    return S3Store(
        origin.removeprefix("s3://"),
        prefix=key or None,
        region=_region(),
        # Without credentials, requests are not signed, which is sufficient for public buckets.
        skip_signature=not _has_credentials(),
        **settings,
    )


def _profile_credentials() -> Any:
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise InputError(
            "AWS_PROFILE: reading profiles requires boto3; pip install boto3, or set "
            "AWS_ACCESS_KEY_ID"
        ) from error
    return Boto3CredentialProvider(Session())


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
