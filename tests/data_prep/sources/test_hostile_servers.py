"""Servers that are silent, never stop or claim huge sizes end a command in one line, in time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest

from data_prep import fetch_tables
from data_prep.download import download
from data_prep.fetch import FetchConfig
from data_prep.sources import Plane, probe_planes, read_planes
from perturbjax.core.errors import InputError

pytest.importorskip("obstore")
#: Time limit of an object in these tests, in seconds.
LIMIT_S = 0.5


@pytest.fixture(autouse=True)
def short_limit(no_credentials, monkeypatch):
    monkeypatch.setenv("PERTURBJAX_TIMEOUT", str(LIMIT_S))


def send_endlessly(self, size: int | None = None, status: int = 200) -> None:
    self.send_response(status)
    if status == 206:
        self.send_header("Content-Range", f"bytes 0-{size - 1}/{size}")
    if size is not None:
        self.send_header("Content-Length", str(size))
    self.end_headers()
    if self.command == "HEAD":
        return
    try:
        while True:
            self.wfile.write(bytes(1 << 16))
    except OSError:
        pass


def send_slowly(self) -> None:
    self.send_response(200)
    self.send_header("Content-Length", "100000")
    self.end_headers()
    try:
        while self.command == "GET":
            self.wfile.write(b"x")
            time.sleep(0.05)
    except OSError:
        pass


SERVERS: dict[str, dict[str, Callable]] = {
    "endless": {"do_GET": send_endlessly},
    "10 GB": {"do_GET": lambda self: send_endlessly(self, 10**10)},
    "range of 10 GB": {
        "do_GET": lambda self: send_endlessly(self, 10**10, 206),
        "do_HEAD": lambda self: send_endlessly(self, 100_000),
    },
    "silent": {"do_GET": lambda self: time.sleep(1)},
    "slow": {"do_GET": send_slowly},
}


@pytest.mark.parametrize("name", SERVERS)
def test_hostile_server_is_one_line_in_time(answering, tmp_path, monkeypatch, name):
    monkeypatch.setattr("data_prep.sources.files.LARGEST_FILE", 1 << 22)
    handlers = {"do_HEAD": SERVERS[name]["do_GET"], **SERVERS[name]}
    url = answering(**handlers)
    start = time.monotonic()
    for read in (read_planes, probe_planes):
        with pytest.raises(InputError, match=r"row 2: http://127.*a\.tiff .*") as refused:
            read([Plane(f"{url}/a.tiff")], "row 2")
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"http://127.*a\.csv"):
        download(f"{url}/a.csv", tmp_path / "a.csv", 1 << 22)
    # Three reads, and the start of the library.
    assert time.monotonic() - start < 3 * LIMIT_S + 10
    assert not list(tmp_path.iterdir())


def send_page(self, content: bytes, more: str = "") -> None:
    token = f"<NextContinuationToken>{more}</NextContinuationToken>" if more else ""
    self.send_response(200)
    self.end_headers()
    self.wfile.write(b"<ListBucketResult>" + content + token.encode() + b"</ListBucketResult>")


@pytest.mark.parametrize(
    ("content", "pages", "message"),
    [
        (b"<Key>f/a</Key>", itertools.count(1), "was not received within 0.5 s"),
        (b"<Key>f/a</Key>", itertools.repeat(7), "repeats a page"),
        (b"<Key>f/\xff</Key>", itertools.repeat(""), "is not UTF-8 text"),
    ],
    ids=["endless", "repeated", "binary"],
)
def test_listing_of_a_hostile_server_ends(answering, tmp_path, content, pages, message):
    url = answering(do_GET=lambda self: send_page(self, content, str(next(pages))))
    options = FetchConfig(plate="P", out=tmp_path, base_url=url)
    with pytest.raises(InputError, match=message):
        fetch_tables._list_folder(options, "f")


def test_endless_listing_of_a_bucket_ends(answering, monkeypatch):
    pages = itertools.count(1)
    entry = b"<Contents><Key>a/x</Key><Size>1</Size><ETag>e</ETag>"
    entry += b"<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
    truncated = b"<IsTruncated>true</IsTruncated>"
    url = answering(do_GET=lambda self: send_page(self, truncated + entry, str(next(pages))))
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    from data_prep.sources.files import names_of_folder

    with pytest.raises(InputError, match=r"s3://bucket/a was not received within 0\.5 s"):
        names_of_folder("s3://bucket/a")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "http://[::1"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:99999"),
        ("AWS_ENDPOINT_URL", "nowhere"),
        ("AWS_REGION", "a/b"),
        ("AWS_REGION", "\x01"),
        ("PERTURBJAX_TIMEOUT", "soon"),
        ("PERTURBJAX_TIMEOUT", "-1"),
    ],
)
def test_invalid_settings_are_one_line(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=name):
        probe_planes([Plane("s3://bucket/a.tiff")], "row 2")


@pytest.mark.parametrize(
    "url", ["file:///etc", "ftp://a", "http://[::1", "http://a:x", "http://ü", "http://a b", "a"]
)
def test_address_of_a_gallery_must_be_a_url(tmp_path, url):
    with pytest.raises(InputError, match=r"base-url|is not a valid URL"):
        FetchConfig(plate="P", out=tmp_path, base_url=url)


def test_names_too_long_for_a_file_are_refused():
    with pytest.raises(InputError, match="has more than 150 bytes"):
        fetch_tables.require_file_name("x" * 300, "load_data.csv")
