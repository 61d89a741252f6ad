"""Published weights by name: found in the cellpose package's cache, or fetched from where the package gets them."""

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
#: Name → where the file is published.
FILES = {
    "nuclei": f"{URL}/nucleitorch_0",
    "cyto": f"{URL}/cytotorch_0",
    "cyto2": f"{URL}/cyto2torch_0",
    "cyto3": f"{URL}/cyto3",
    "cpsam": f"{SAM_URL}/cpsam",
}
#: Weights that come with the program, by their files' names.
SHIPPED = Path(__file__).parent / "weights"
#: SHA-256 of files that were verified. Publishers give none: what is not listed is told of, never trusted silently.
DIGESTS = {"cpsam": "e1440429eb384f95afe32bcba6510f90d518eaedc917ede549bed6804004abe2"}
#: Bytes beyond which nothing of this kind can be meant; cpsam has 1.2 thousand million, the others 27 million.
LARGEST_FILE = 2**31
TIMEOUT_S = 30


def find(weights: str | Path, server: str = "", flag: str = "weights") -> Path:
    """The file behind a name or a path; a file of that name in the working directory goes before the name.

    `server` is a URL to fetch from in place of the publishers'.

    Raises:
        InputError: it is neither a file nor a known name, cannot be fetched, or is not what was published.
    """
    if not str(weights):
        raise InputError("--weights: needs a NAME or PATH; nothing is chosen for you")
    path = Path(weights)
    if path.is_file():
        return path.resolve()
    if (ours := SHIPPED / f"{path.name}.safetensors").is_file() and path.name == str(weights):
        return ours
    if str(weights) not in FILES:
        there = ", ".join([*FILES, *sorted(file.stem for file in SHIPPED.glob("*.safetensors"))])
        raise InputError(
            f"--{flag} {weights}: no such file, and no model of that name; there are {there}"
        )
    published = FILES[str(weights)]
    file = published.rsplit("/", 1)[1]
    cached = cache() / file
    if not cached.is_file():
        _fetch(f"{server}/{file}" if server else published, cached, str(weights))
    return cached


def cache() -> Path:
    """The folder that the package keeps its models in."""
    return Path(os.environ.get("CELLPOSE_LOCAL_MODELS_PATH") or Path.home() / ".cellpose/models")


def _fetch(url: str, path: Path, name: str) -> None:
    console.print(f"fetching {url} to {path}")
    with _opened(url, name) as answer, atomic(path) as temporary:
        with open(temporary, "wb") as file:
            size = sum(file.write(block) for block in _blocks(answer, url, name))
        expected = answer.headers.get("Content-Length", "")
        if not size or (expected.isdecimal() and int(expected) != size):
            raise InputError(
                f"--weights {name}: {url} broke off after {size} bytes; try again or give a PATH"
            )
        if (known := DIGESTS.get(name)) and file_digest(temporary) != known:
            raise InputError(
                f"--weights {name}: {url} is not the published file (SHA-256); give a PATH"
            )


def _opened(url: str, name: str) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(url, timeout=TIMEOUT_S)
    except (http.client.HTTPException, ValueError, OSError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the reply, too
        raise _unfetched(url, name, error) from error


def _blocks(answer: http.client.HTTPResponse, url: str, name: str) -> Iterator[bytes]:
    size = 0
    while size <= LARGEST_FILE:
        try:
            block = answer.read(2**20)
        except (http.client.HTTPException, OSError) as error:
            raise _unfetched(url, name, error) from error
        if not block:
            return
        size += len(block)
        yield block
    raise InputError(f"--weights {name}: {url} sends more than {LARGEST_FILE} bytes; give a PATH")


def _unfetched(url: str, name: str, error: Exception) -> InputError:
    reason = getattr(error, "reason", error)
    return InputError(f"--weights {name}: {url} could not be fetched ({reason}); give a PATH")
