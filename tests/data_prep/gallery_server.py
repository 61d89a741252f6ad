"""A local server in place of the Cell Painting Gallery, and changes of the files that it serves."""

from __future__ import annotations

from collections import Counter
from html import escape
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pandas as pd


class Gallery(SimpleHTTPRequestHandler):
    """Serve files and list folders as S3 does; interrupt the first `broken` responses."""

    def __init__(self, *arguments, requests: Counter, broken: dict[str, int], **options):
        self.requests, self.broken = requests, broken
        super().__init__(*arguments, **options)

    def do_GET(self):
        if "list-type=2" in self.path:
            self.list_objects()
            return
        name = Path(self.path).name
        self.requests[name] += 1
        if self.broken.get(name, 0) >= self.requests[name]:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"only this")
            return
        super().do_GET()

    def list_objects(self):
        """Return two keys per page, as for a long folder."""
        query = parse_qs(urlsplit(self.path).query)
        folder = Path(self.directory) / query["prefix"][0]
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        start = int(query.get("continuation-token", ["0"])[0])
        keys = "".join(
            f"<Key>{query['prefix'][0]}{escape(name)}</Key>" for name in names[start : start + 2]
        )
        more = (
            f"<NextContinuationToken>{start + 2}</NextContinuationToken>"
            if start + 2 < len(names)
            else ""
        )
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"<ListBucketResult>{keys}{more}</ListBucketResult>".encode())

    def log_message(self, *_):
        pass


def change(served: Path, name: str, old: str, new: str) -> None:
    """Replace text in a served file."""
    (file,) = served.rglob(name)
    file.write_text(file.read_text().replace(old, new))


def move_plate(tmp_path: Path, accession: str, source: str) -> Path:
    """Serve the plate under another accession; returns its root."""
    served = tmp_path / "served"
    (served / accession).mkdir()
    (served / "cpg0000-jump-pilot/source_4").rename(served / accession / source)
    return served / accession / source


def read_rows(root: Path) -> tuple[Path, pd.DataFrame]:
    path = next(root.rglob("load_data.csv"))
    return path, pd.read_csv(path, dtype=str)


def rename_files(root: Path, numbers: dict[str, int]) -> None:
    """Rename files as Opera Phenix does, with the given channel numbers."""
    path, table = read_rows(root)
    for channel, number in numbers.items():
        for name in table[f"FileName_Orig{channel}"]:
            file = next(root.rglob(name))
            file.rename(file.with_name(f"{file.stem}-ch{number}sk1fk1fl1.tiff"))
        table[f"FileName_Orig{channel}"] = (
            table[f"FileName_Orig{channel}"].str[:-5] + f"-ch{number}sk1fk1fl1.tiff"
        )
    table.columns = [
        column.replace("Actin", "AGP").replace("Tubulin", "ER") for column in table.columns
    ]
    table.to_csv(path, index=False)
