"""Find weights by name or path; published weights are downloaded once into the cache of the
cellpose package."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, file_digest
from perturbjax.core.messages import console

URL, SAM_URL = (
    "https://www.cellpose.org/models",
    "https://huggingface.co/mouseland/cellpose-sam/resolve/main",
)
#: Name of the weights to the URL of the file.
FILES = {
    "nuclei": f"{URL}/nucleitorch_0",
    "cyto": f"{URL}/cytotorch_0",
    "cyto2": f"{URL}/cyto2torch_0",
    "cyto3": f"{URL}/cyto3",
    "cpsam": f"{SAM_URL}/cpsam",
}
#: Folder of the weights included in perturbjax.
SHIPPED = Path(__file__).parent / "weights"
#: SHA-256 of the published files that were verified; publishers list no checksums of the rest.
DIGESTS = {"cpsam": "e1440429eb384f95afe32bcba6510f90d518eaedc917ede549bed6804004abe2"}
#: Maximum size of a download in bytes; cpsam has 1.2e9, every other one 27e6.
LARGEST_FILE = 2**31
TIMEOUT_S = 30


def find(weights: str | Path, server: str = "", flag: str = "weights") -> Path:
    """Return the path of weights; an existing file takes precedence over a name.

    Args:
        weights: name of published or included weights, or path of a file.
        server: URL to download from instead of the publisher's.
        flag: name of the option, for messages.

    Raises:
        InputError: it is neither a file nor the name of weights, or the download fails or differs
            from the published file.
    """
    if not str(weights):
        raise InputError("--weights: needs a NAME or PATH; there is no default model")
    path = Path(weights)
    if path.is_file():
        return path.resolve()
    # A name with a folder is a path, and not a name of included weights.
    if (ours := SHIPPED / f"{path.name}.safetensors").is_file() and path.name == str(weights):
        return ours
    if str(weights) not in FILES:
        available = ", ".join(
            [*FILES, *sorted(file.stem for file in SHIPPED.glob("*.safetensors"))]
        )
        raise InputError(
            f"--{flag} {weights}: no such file, and no model of that name (available: {available})"
        )
    published = FILES[str(weights)]
    file = published.rsplit("/", 1)[1]
    # The cellpose package uses the same folder and file names, so downloads are shared.
    cached = cache() / file
    if not cached.is_file():
        _fetch(f"{server}/{file}" if server else published, cached, str(weights))
    return cached


def cache() -> Path:
    """Return the folder in which the cellpose package stores models."""
    return Path(os.environ.get("CELLPOSE_LOCAL_MODELS_PATH") or Path.home() / ".cellpose/models")


def _fetch(url: str, path: Path, name: str) -> None:
    console.print(f"info: downloading {url} to {path}")
    with _open_url(url, name) as response, atomic(path) as temporary:
        with open(temporary, "wb") as file:
            size = sum(file.write(block) for block in _read_blocks(response, url, name))
        # The server may omit the length. These checks run before the file gets its final name, so
        # that an incomplete file is never cached.
        expected = response.headers.get("Content-Length", "")
        if not size or (expected.isdecimal() and int(expected) != size):
            raise InputError(
                f"--weights {name}: the download of {url} stopped after {size} bytes. Try again or "
                "pass a PATH"
            )
        if (published := DIGESTS.get(name)) and file_digest(temporary) != published:
            raise InputError(
                f"--weights {name}: {url} differs from the published file (SHA-256). Pass a PATH"
            )


def _open_url(url: str, name: str) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(url, timeout=TIMEOUT_S)
    except (http.client.HTTPException, ValueError, OSError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is also the response
        raise _download_error(url, name, error) from error


def _read_blocks(response: http.client.HTTPResponse, url: str, name: str) -> Iterator[bytes]:
    size = 0
    # A limit, because the server decides how much it sends.
    while size <= LARGEST_FILE:
        try:
            block = response.read(2**20)
        except (http.client.HTTPException, OSError) as error:
            raise _download_error(url, name, error) from error
        if not block:
            return
        size += len(block)
        yield block
    raise InputError(f"--weights {name}: {url} sends more than {LARGEST_FILE} bytes. Pass a PATH")


def _download_error(url: str, name: str, error: Exception) -> InputError:
    reason = getattr(error, "reason", error)
    return InputError(f"--weights {name}: {url} cannot be downloaded ({reason}). Pass a PATH")
