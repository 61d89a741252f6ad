"""Connect to a bucket or a server with obstore, and list a folder of a bucket in a child process.

obstore collects a whole listing in memory, and its Rust library aborts the process if the memory is
exhausted. `list_folder` therefore runs this file as a script, with a limit of memory and time. The
script imports only obstore, so that it starts quickly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

#: Maximum memory of a listing. A folder of a million names needs about 400 MB.
MEMORY_BYTES = 768 << 20


def connect(settings: dict[str, Any]) -> Any:
    """Connect to a bucket or a server.

    Args:
        settings: `url` of a server, or `bucket`, `prefix`, `region` and `signed`; `connect_s` and
            `request_s`, time limits in seconds; `retries`, number of retries after temporary
            failures.
    """
    from obstore.store import HTTPStore, S3Store

    limits: Any = {
        "client_options": {
            "allow_http": True,  # for local servers; AWS_ENDPOINT_URL receives the credentials
            "connect_timeout": timedelta(seconds=settings["connect_s"]),
            "timeout": timedelta(seconds=settings["request_s"]),
        },
        "retry_config": {
            "max_retries": settings["retries"],
            "retry_timeout": timedelta(seconds=settings["request_s"]),
        },
    }
    if "url" in settings:
        return HTTPStore.from_url(settings["url"], **limits)
    if settings["signed"] and os.environ.get("AWS_PROFILE"):
        # obstore does not read AWS profiles.
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider

        limits["credential_provider"] = Boto3CredentialProvider(Session())
    return S3Store(
        settings["bucket"],
        prefix=settings["prefix"] or None,
        region=settings["region"],
        # Without credentials, requests are not signed, which is sufficient for public buckets.
        skip_signature=not settings["signed"],
        **limits,
    )


class ListingError(Exception):
    """The child process failed: name of the exception, then its message."""


def list_folder(
    settings: dict[str, Any], key: str, limit_s: float, wait: Callable[[float], None]
) -> list[str]:
    """List the names directly below a folder of a bucket, in a child process.

    Args:
        settings: Argument of `connect`.
        key: Folder in the bucket.
        limit_s: Maximum time in seconds.
        wait: Function that is called now and then with the time since the start, in seconds.

    Raises:
        ListingError: The listing failed.
        TimeoutError: The listing takes longer than `limit_s`.
    """
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    request: str | None = json.dumps([settings, key])
    try:
        while True:
            elapsed = time.monotonic() - start
            if elapsed > limit_s:
                raise TimeoutError
            try:
                answer = child.communicate(request, timeout=min(10, limit_s - elapsed + 0.01))[0]
                break
            except subprocess.TimeoutExpired:
                request = None
                wait(time.monotonic() - start)
    finally:
        child.kill()
        child.wait()
    if child.returncode or not answer:
        raise ListingError(
            "ListingTooLarge",
            f"the listing needs more than {MEMORY_BYTES >> 20} MB, or the server is faulty",
        )
    result = json.loads(answer)
    if "error" in result:
        raise ListingError(*result["error"])
    return result["names"]


def _main() -> None:
    """Read settings and folder from stdin, and write the names or the error to stdout, as JSON."""
    try:
        import resource

        # Linux counts only written memory for this limit; macOS ignores it.
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass
    settings, key = json.load(sys.stdin)
    try:
        import obstore

        page = obstore.list_with_delimiter(connect(settings), prefix=key or None)
        # Folders are common prefixes of keys; objects are the files.
        keys = [*page["common_prefixes"], *(entry["path"] for entry in page["objects"])]
        result: dict[str, Any] = {"names": [key.rstrip("/").rpartition("/")[2] for key in keys]}
    except BaseException as error:  # the Rust library also raises PanicException
        result = {"error": [type(error).__name__, str(error)]}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    _main()
