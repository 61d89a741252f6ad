"""Servers that are silent, never stop sending, claim huge sizes or send damaged listings."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd

from tests.faults.arena import CommandServer, Request, reset, words
from tests.faults.images import build_flags, write_plate
from tests.faults.material import Material
from tests.faults.outcomes import Finding, make_finding

#: Time limit of an object in these tests, and of a whole command, in seconds.
OBJECT_S, COMMAND_S = 4, 100.0
_KEY = "<Contents><Key>images/{}.tif</Key><Size>1</Size><ETag>e</ETag>"
_KEY += "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"


class Handler(BaseHTTPRequestHandler):
    """Send headers and a body without end."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer({"Content-Length": "100000"}, body=False)

    def do_GET(self) -> None:
        raise NotImplementedError

    def answer(
        self, headers: Mapping[str, str], status: int = 200, pause: float = 0.0, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        piece = bytes(1 if pause else 1 << 16)
        chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
        try:
            while body:
                self.wfile.write(chunk if "Transfer-Encoding" in headers else piece)
                time.sleep(pause)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Endless(Handler):
    def do_GET(self) -> None:
        self.answer({"Transfer-Encoding": "chunked"})


class Claiming(Handler):
    """Claim 10 GB."""

    def do_HEAD(self) -> None:
        self.answer({"Content-Length": str(10**10)}, body=False)

    def do_GET(self) -> None:
        self.answer({"Content-Length": str(10**10)})


class ClaimingRange(Handler):
    """Claim a range of 10 GB of an object that has 100 kB."""

    size = 10**10

    def do_GET(self) -> None:
        if "Range" not in self.headers:
            self.answer({"Content-Length": "100000"})
            return
        bounds = f"bytes 0-{self.size - 1}/{self.size}"
        self.answer({"Content-Range": bounds, "Content-Length": str(self.size)}, 206)


class ClaimingLargestRange(ClaimingRange):
    size = 2**63 - 1


class Silent(Handler):
    """Accept the connection, and send nothing."""

    def do_GET(self) -> None:
        time.sleep(COMMAND_S)

    do_HEAD = do_GET


class Trickling(Handler):
    """Send one byte now and then."""

    def do_GET(self) -> None:
        self.answer({"Content-Length": "100000"}, pause=0.2)


class EndlessListing(Handler):
    """Answer every listing with a page and a token for the next one."""

    pages = itertools.count()

    def do_GET(self) -> None:
        page = next(self.pages)
        keys = "".join(_KEY.format(f"{page}_{number}") for number in range(1000))
        self.send_page(f"<NextContinuationToken>{page}</NextContinuationToken>{keys}".encode())

    def send_page(self, content: bytes) -> None:
        more = b"true" if b"NextContinuationToken" in content else b"false"
        text = b"<ListBucketResult><IsTruncated>%b</IsTruncated>%b</ListBucketResult>"
        text %= (more, content)
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class RepeatedListing(EndlessListing):
    pages = itertools.repeat(1)


class BinaryListing(EndlessListing):
    def do_GET(self) -> None:
        self.send_page(_KEY.format("NAME").encode().replace(b"NAME", b"\xff\xfe"))


class LongNames(EndlessListing):
    def do_GET(self) -> None:
        self.send_page(_KEY.format("x" * 10**6).encode())


class Gallery(Handler):
    """Serve the tables of a plate without a compound table, so that `fetch` lists a folder."""

    plate: Path

    def do_GET(self) -> None:
        if "list-type" in self.path:
            super().do_GET()
            return
        table = pd.read_csv(self.plate / "load_data.csv", dtype=str)
        folders = {name: "/B/images/P" for name in table if name.startswith("PathName")}
        wells = "".join(f"{well}\tX\n" for well in sorted(set(table["Metadata_Well"])))
        answers = {
            "load_data.csv": table.assign(**folders).to_csv(index=False),
            "barcode_platemap.csv": "Assay_Plate_Barcode,Plate_Map_Name\nP,M\n",
            "M.txt": f"well_position\tbroad_sample\n{wells}",
        }
        text = answers.get(self.path.rpartition("/")[2], "").encode()
        self.send_response(200 if text else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


OBJECTS = (Endless, Claiming, ClaimingRange, ClaimingLargestRange, Silent, Trickling)
LISTINGS = (EndlessListing, RepeatedListing, BinaryListing, LongNames, Endless, Claiming, Silent)
#: Case → environment variables of requests to S3.
SETTINGS: dict[str, dict[str, str]] = {
    "endpoint is not a URL": {"AWS_ENDPOINT_URL": "nowhere"},
    "endpoint is an incomplete IPv6 address": {"AWS_ENDPOINT_URL": "http://[::1"},
    "endpoint with port 99999": {"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"},
    "endpoint without server": {"AWS_ENDPOINT_URL": "http://"},
    "region with a slash": {"AWS_REGION": "a/b"},
    "region with a space": {"AWS_REGION": "us east"},
    "region of control characters": {"AWS_REGION": "\x01"},
    "region of 300 letters": {"AWS_REGION": "a" * 300},
    "time limit is not a number": {"PERTURBJAX_TIMEOUT": "soon"},
    "time limit of 0 s": {"PERTURBJAX_TIMEOUT": "0"},
}
ADDRESSES = (
    "http://[::1/a",
    "http://127.0.0.1:99999/a",
    "http://127.0.0.1:x/a",
    "http:///a",
    "https://a b/c",
    "s3://",
    "s3://a_b?c/d",
    "s3://[::1/d",
    "s3://" + "b" * 300,
    "http://" + "h" * 300 + "/a",
    "http://xn--/a",
    "http://user:secret@127.0.0.1:1/a",
)


@contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    """Run a server; yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    # Handler threads that still sleep or send end with the process.
    server.socket.close()


def hostile_servers(server: CommandServer, material: Material, root: Path) -> Iterator[Finding]:
    """Read images and tables of hostile servers; each command must end in one line, in time."""
    plate = write_plate(material, "TIFF, LZW")

    def run(
        case: str, command: list[str], environment: Mapping[str, str], secret: str = "\0"
    ) -> Finding:
        variables = {"PERTURBJAX_TIMEOUT": str(OBJECT_S), "AWS_EC2_METADATA_DISABLED": "true"}
        request = Request(command, root / "work", {**variables, **environment}, limit_s=COMMAND_S)
        result = server.run(request)
        finding = make_finding("hostile server", case, result)
        is_safe = result.status != 0 and secret not in result.stderr
        return finding.require(is_safe, "wrong result")

    def build(images: str, zarr: bool = False) -> list[str]:
        if zarr:
            command = "data_prep build --images {} --out {} --label-column none"
            return words(command, f"{images}/a.zarr", root / "OUT")
        flags = build_flags(plate, root / "OUT")
        flags[flags.index("--images") + 1] = images
        return flags

    def fetch() -> list[str]:
        out = root / "fetched"
        shutil.rmtree(out, ignore_errors=True)
        return words("data_prep fetch --plate P --batch B --accession A --out {}", out)

    reset(root)
    for kind in OBJECTS:
        with serving(kind) as url:
            yield run(f"HTTP image, {kind.__name__}", build(url), {})
            yield run(f"HTTP Zarr, {kind.__name__}", build(url, zarr=True), {})
    for kind in (*LISTINGS, Trickling):
        with serving(kind) as url:
            s3 = {"AWS_ENDPOINT_URL": url}
            yield run(f"S3 listing, {kind.__name__}", build("s3://bucket/a"), s3)
    for kind in OBJECTS:
        with serving(kind) as url:
            yield run(f"fetch, {kind.__name__}", fetch(), {"PERTURBJAX_GALLERY_URL": url})
    for kind in LISTINGS:
        gallery = type(kind.__name__, (Gallery, kind), {"plate": plate})
        with serving(gallery) as url:
            case = f"fetch, listing, {kind.__name__}"
            yield run(case, fetch(), {"PERTURBJAX_GALLERY_URL": url})
    for case, environment in SETTINGS.items():
        yield run(f"S3, {case}", build("s3://bucket/a"), environment)
    for address in ADDRESSES:
        yield run(f"images at {address[:40]}", build(address), {}, secret="secret")
        variables = {"PERTURBJAX_GALLERY_URL": address}
        yield run(f"fetch from {address[:40]}", fetch(), variables, secret="secret")
