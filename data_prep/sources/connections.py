"""Addresses, time limits and credentials of remote files, and messages about them."""

from __future__ import annotations

import math
import os
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from perturbjax.core.errors import InputError

SCHEME = re.compile("(s3|https?)://")
#: Environment variable with the time limit in seconds of an object or listing, and its default.
TIMEOUT, TIMEOUT_S = "PERTURBJAX_TIMEOUT", 300.0
#: Time limit in seconds for a connection, and number of retries of a request.
CONNECT_S, RETRIES = 10, 5
#: Environment variables with AWS credentials. Requests are not signed if none is set.
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
#: Other environment variables that a connection depends on.
_CONNECTION = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", TIMEOUT)
_USER = re.compile(r"(?<=://)[^/\s]+@")
_SECRET = re.compile(r"(?i)(?<=[?&])((?:x-amz-[a-z-]*|token|sig|signature|key|password)=)[^&\s]+")


def is_remote(path: str) -> bool:
    """Return whether a path is a URL of a supported scheme."""
    return bool(SCHEME.match(path))


def redacted(text: str) -> str:
    """Replace user names, passwords and signatures in URLs by `***`, for messages."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def time_limit() -> float:
    """Return the maximum number of seconds for an object or listing, with all attempts.

    Raises:
        InputError: The environment variable is not a positive number.
    """
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise InputError(f"{TIMEOUT}={text}: must be a positive number of seconds")
    return seconds


def split_url(url: str) -> tuple[str, str]:
    """Split a URL into bucket or server, and key."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises for an invalid port)
    except ValueError as error:  # such as an incomplete IPv6 address
        raise InputError(f"{redacted(url)}: is not a valid URL ({error})") from error
    if not parts.netloc:
        raise InputError(f"{url}: the {'bucket' if parts.scheme == 's3' else 'server'} is missing")
    # Keys in S3 can contain percent signs; URLs of servers are percent-encoded.
    path = parts.path if parts.scheme == "s3" else unquote(parts.path)
    return f"{parts.scheme}://{parts.netloc}", path.strip("/")


def has_credentials() -> bool:
    return any(os.environ.get(name) for name in CREDENTIALS)


def region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def environment() -> tuple[str, ...]:
    """Return the environment variables that a connection depends on, as a cache key."""
    return tuple(os.environ.get(name, "") for name in (*CREDENTIALS, *_CONNECTION))


def connection_settings(root: str) -> dict[str, Any]:
    """Return the settings of a connection; see `connect`.

    Raises:
        InputError: An environment variable is not valid.
    """
    _require_environment()
    settings = {"connect_s": CONNECT_S, "request_s": time_limit(), "retries": RETRIES}
    origin, key = split_url(root)
    if not origin.startswith("s3://"):
        return settings | {"url": root}
    bucket = origin.removeprefix("s3://")
    return settings | {
        "bucket": bucket,
        "prefix": key,
        "region": region(),
        "signed": has_credentials(),
    }


def _require_environment() -> None:
    """Check the environment variables of S3, for which obstore has no error messages."""
    if not re.fullmatch("[A-Za-z0-9-]{1,64}", region()):
        raise InputError(f"AWS_REGION={region()!r}: is not a region, such as us-east-1")
    if endpoint := os.environ.get("AWS_ENDPOINT_URL", ""):
        if not re.fullmatch("https?://[!-~]+", endpoint):
            raise InputError(
                f"AWS_ENDPOINT_URL={redacted(endpoint)!r}: is not a URL, such as https://server"
            )
        try:
            split_url(endpoint)
        except InputError as error:
            raise InputError(f"AWS_ENDPOINT_URL={error}") from error
    if os.environ.get("AWS_PROFILE"):
        try:
            import boto3  # noqa: F401
        except ImportError as error:
            raise InputError(
                "AWS_PROFILE: reading profiles requires boto3; pip install boto3, or set "
                "AWS_ACCESS_KEY_ID"
            ) from error


def describe(kind: str, message: str) -> str:
    text = redacted(message)
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or re.search(r"\b40[13] ", text):
        signed = (
            "the credentials in the environment were refused"
            if has_credentials()
            else "no credentials in the environment"
        )
        return (
            f"cannot be read: no permission ({signed}); set AWS_ACCESS_KEY_ID and its secret, or "
            "unset them for a public bucket"
        )
    if "redirect" in text.lower() or re.search(r"\b30[1278] ", text):
        return (
            f"is redirected: the bucket is in another region than {region()}; set AWS_REGION to "
            "the region of the bucket"
        )
    if kind == "PanicException":
        return (
            "cannot be read: the address is not valid; check the URL, AWS_REGION and "
            "AWS_ENDPOINT_URL"
        )
    line = text.splitlines()[0][:300] if text else kind
    return f"cannot be read ({line}); run the same command again to resume"
