"""Fixtures: a local S3 server in a separate process, and local HTTP servers that fail."""

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
    """Start the S3 server of moto in a separate process; returns its URL."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert process.stderr is not None
    url = next(
        match[0]
        for line in process.stderr
        if (match := re.search(r"http://127[.0-9]+:[0-9]+", line))
    )
    threading.Thread(
        target=process.stderr.read, daemon=True
    ).start()  # otherwise its log fills the pipe
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
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove AWS credentials from the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def s3(s3_server: str, no_credentials: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Client of the local S3 server; the environment selects this server too."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests"}
    return boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1", **keys)


@pytest.fixture
def uploaded(s3: Any) -> Callable[..., str]:
    """Function that uploads a folder to a new bucket and returns its URL."""

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
    """Function that serves a folder (without byte ranges) or a handler and returns the URL."""
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
    """Fail with `status` for the first `bad` requests, then return `content`."""

    status, bad, content = 403, 10**9, b""
    requests: int

    def do_GET(self) -> None:
        type(self).requests += 1
        good = type(self).requests > self.bad
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
    """Function that starts an `Answering` server with the given attributes; returns its URL."""

    def start(**facts: object) -> str:
        return served(type("Configured", (Answering,), {"requests": 0, **facts}))

    return start
