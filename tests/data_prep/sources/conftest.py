"""An S3 server in a process of its own, and HTTP servers that answer badly, all on the loopback interface."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Where moto's server answers: its own process, on a port that it chose."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    url = next(
        found[0]
        for line in process.stderr
        if (found := re.search(r"http://127[.0-9]+:[0-9]+", line))
    )
    threading.Thread(target=process.stderr.read, daemon=True).start()  # else its log fills the pipe
    for _ in range(100):
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            time.sleep(0.1)
    yield url
    process.kill()
    process.wait()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, whatever the environment of the tests has."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def s3(s3_server: str, nobody: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of that server, to which the environment points."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests"}
    return boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1", **keys)


@pytest.fixture
def uploaded(s3: Any) -> Callable[..., str]:
    """Upload a folder into a bucket of its own, for everybody to read or not; its URL."""

    def upload(folder: Path, bucket: str, acl: str = "public-read") -> str:
        s3.create_bucket(Bucket=bucket)
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"some where/{path.relative_to(folder)}"
                s3.upload_file(str(path), bucket, key, ExtraArgs={"ACL": acl})
        return f"s3://{bucket}/some where"

    return upload


@pytest.fixture
def served() -> Iterator[Callable[..., str]]:
    """Serve by a handler, or a folder (without ranges, as Python's own server); the URL."""
    servers: list[ThreadingHTTPServer] = []

    def serve(handler: Any) -> str:
        if isinstance(handler, Path):
            handler = functools.partial(Quiet, directory=str(handler))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Answering(BaseHTTPRequestHandler):
    """Answers everything with `status`, and what S3 would say; after `bad` such answers with `content`."""

    status, bad, content = 403, 10**9, b""
    asked: int

    def do_GET(self) -> None:
        type(self).asked += 1
        good = type(self).asked > self.bad
        body = self.content if good else b"<Error><Code>Refused</Code></Error>"
        self.send_response(200 if good else self.status)
        self.send_header("Content-Length", str(len(body)))
        if self.status == 301 and not good:
            self.send_header("x-amz-bucket-region", "eu-west-1")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering(served: Callable[..., str]) -> Callable[..., str]:
    """A server that answers as `Answering` is told to; its URL."""

    def start(**facts: object) -> str:
        return served(type("Told", (Answering,), {"asked": 0, **facts}))

    return start
