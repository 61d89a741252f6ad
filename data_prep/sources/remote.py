"""Objects in S3 and files behind HTTPS, streamed through obstore: nothing is kept on this machine's disk.

Credentials are the user's own where the environment has any (`AWS_ACCESS_KEY_ID` or `AWS_PROFILE`, `AWS_REGION`,
`AWS_ENDPOINT_URL`), and else nobody's: public buckets need none. What may pass (a connection that broke, a server that
is busy) is tried again by obstore, with growing pauses; what may not (no such object, no permission) ends in one line.
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
#: Seconds that a connection may take, and one answer as a whole; how often and how long an object is tried again.
CONNECT_S, ANSWER_S, RETRIES, RETRY_S = 10, 120, 5, 180
#: Bytes asked for at once where a header alone is wanted.
HEADER_BYTES = 1 << 16
#: Tries of an object whose answer began and then broke off, which obstore does not try again.
TRIES = 3
#: Where the credentials of AWS come from in an environment; none of them means that requests are not signed.
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


def is_remote(path: str) -> bool:
    """Whether it is a URL that is read here."""
    return bool(SCHEME.match(path))


def open_remote(file: str, where: str, most: int, header: bool = False) -> io.BufferedIOBase:
    """An object to read and seek in: whole in memory, or with `header` read in small pieces as they are needed.

    Raises:
        InputError: it is not there, may not be read, has more than `most` bytes, or no try succeeded.
    """
    if header:
        size = cast(int, asked(file, where, lambda store, key: _obstore().head(store, key)["size"]))
        if size > HEADER_BYTES:
            return io.BufferedReader(_Pieces(file, where, size), HEADER_BYTES)
    return io.BytesIO(_whole(file, where, most))


def names_of_prefix(folder: str, where: str) -> list[str]:
    """Names right below a prefix of a bucket; none behind HTTPS, which lists nothing.

    Raises:
        InputError: the bucket may not be listed, or no try succeeded.
    """
    if not folder.startswith("s3://"):
        return []

    def listed(store: Any, key: str) -> list[str]:
        found = _obstore().list_with_delimiter(store, prefix=key.strip("/") or None)
        return [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]

    return [key.rstrip("/").rpartition("/")[2] for key in asked(folder, where, listed)]


def is_there(file: str, where: str) -> bool:
    """Whether an object is there.

    Raises:
        InputError: it cannot be known: no permission, or no try succeeded.
    """

    def known(store: Any, key: str) -> bool:
        try:
            _obstore().head(store, key)
        except FileNotFoundError:
            return False
        return True

    return cast(bool, asked(file, where, known))


def remote_zarr(root: str, where: str) -> Any:
    """A store of Zarr below a URL, as zarr-python takes it."""
    from zarr.storage import ObjectStore

    _obstore_or_refuse(root, where)
    return ObjectStore(_store(root, _environment()), read_only=True)


def asked(url: str, where: str, ask: Any) -> Any:
    """What `ask(store, key)` gives of a URL.

    Raises:
        InputError: in one line, whatever went wrong.
    """
    _obstore_or_refuse(url, where)
    origin, key = _split(url)
    try:
        return ask(_store(origin, _environment()), key)
    except InputError:
        raise
    except Exception as error:  # obstore's many kinds
        raise InputError(f"{where}: {url} {reason(error)}") from error


def reason(error: Exception) -> str:
    """What went wrong with an object, in a few words that say what to do."""
    words = str(error)
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError") or re.search(
        r"\b40[13] ", words
    ):
        signed = (
            "the credentials in the environment were refused"
            if _signed()
            else "no credentials were given"
        )
        return f"may not be read ({signed}); set AWS_ACCESS_KEY_ID and its secret, or unset them for a public bucket"
    if "redirect" in words.lower() or re.search(r"\b30[1278] ", words):
        return f"is redirected: its bucket lies in another region than {_region()}; set AWS_REGION to the bucket's"
    line = words.splitlines()[0][:300] if words else type(error).__name__
    return f"cannot be read ({line}); run the same command again to go on"


class _Pieces(io.RawIOBase):
    """An object that is read by ranges; where the server knows none, as a whole."""

    def __init__(self, file: str, where: str, size: int):
        self.file, self.where, self.size, self.at = file, where, size, 0
        self.whole: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(
            0, {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence] + offset
        )
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.size)
        if end <= self.at:
            return 0
        piece = self._piece(end)
        buffer[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)

    def _piece(self, end: int) -> bytes:
        def ranged(store: Any, key: str) -> bytes | None:
            try:
                return bytes(_obstore().get_range(store, key, start=self.at, end=end))
            except Exception as error:
                if type(error).__name__ != "NotSupportedError":
                    raise
                return None

        if self.whole is None:
            piece = cast("bytes | None", asked(self.file, self.where, ranged))
            if piece is not None:
                return piece
            self.whole = _whole(self.file, self.where, self.size)
        return self.whole[self.at : end]


def _whole(file: str, where: str, most: int) -> bytes:
    def body(store: Any, key: str) -> bytes:
        for attempt in range(1, TRIES + 1):
            found = _obstore().get(store, key)
            if found.meta["size"] > most:
                raise InputError(
                    f"{where}: {file} has {found.meta['size']} bytes, more than one plane can; tile it"
                )
            try:
                return bytes(found.bytes())
            except Exception:
                if attempt == TRIES:
                    raise
        raise AssertionError

    return cast(bytes, asked(file, where, body))


def _split(url: str) -> tuple[str, str]:
    """Bucket or server, and the key in it."""
    parts = urlsplit(url)
    if not parts.netloc:
        raise InputError(f"{url}: names no {'bucket' if parts.scheme == 's3' else 'server'}")
    path = parts.path if parts.scheme == "s3" else unquote(parts.path)
    return f"{parts.scheme}://{parts.netloc}", path.strip("/")


def _signed() -> bool:
    return any(os.environ.get(name) for name in CREDENTIALS)


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _environment() -> tuple[str, ...]:
    """What of the environment a connection depends on."""
    return (_region(), *(os.environ.get(name, "") for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")))


@functools.lru_cache(maxsize=64)
def _store(root: str, _: tuple[str, ...]) -> Any:
    """A connection to a bucket or a server, kept for the next object."""
    from obstore.store import HTTPStore, S3Store

    settings: Any = {
        "client_options": {
            "allow_http": True,  # a server of one's own; credentials go where AWS_ENDPOINT_URL says
            "connect_timeout": timedelta(seconds=CONNECT_S),
            "timeout": timedelta(seconds=ANSWER_S),
        },
        "retry_config": {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)},
    }
    origin, key = _split(root)
    if not origin.startswith("s3://"):
        return HTTPStore.from_url(root, **settings)
    if os.environ.get("AWS_PROFILE"):
        settings["credential_provider"] = _of_profile()
    bucket = origin.removeprefix("s3://")
    return S3Store(
        bucket, prefix=key or None, region=_region(), skip_signature=not _signed(), **settings
    )


def _of_profile() -> Any:
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise InputError(
            "AWS_PROFILE: profiles are read by boto3; pip install boto3, or set AWS_ACCESS_KEY_ID"
        ) from error
    return Boto3CredentialProvider(Session())


def _obstore() -> Any:
    import obstore

    return obstore


def _obstore_or_refuse(url: str, where: str) -> None:
    try:
        _obstore()
    except ImportError as error:
        raise InputError(
            f'{where}: {url} lies elsewhere; to read it: pip install "perturbjax[remote]"'
        ) from error
