"""Hostile files: small files that try to execute code, never end, or exhaust memory."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from perturbjax.core.files import file_digest
from perturbjax.dataset.reader import content_digest
from tests.faults.arena import MARKER, CommandServer, Request, reset, words
from tests.faults.material import BUILT, Material, plate_flags
from tests.faults.outcomes import Finding, make_finding

#: Module with a class that TFDS would import; the import creates the marker file.
MODULE = f"open({MARKER!r}, 'w').close()\nclass Feature: pass\n"
Command = Callable[[Path, Path], Sequence[str]]
Spoil = Callable[[Path], object]
GIGABYTE = 10**9


def hostile_files(server: CommandServer, material: Material, root: Path) -> Iterator[Finding]:
    """Pass each hostile file to the command that reads its type; the command must refuse it."""
    train = "perturbjax train --data {} --split-file {} --out {}"
    classify = "perturbjax classify --models lda --features {} --out {}"
    import_torch = "perturbjax import-torch --checkpoint {} --out {}"
    inspect = ("data_prep", "inspect")
    groups: list[tuple[dict[str, Spoil], Command]] = [
        (PTH, lambda file, out: words(import_torch, file, out)),
        (CSV, lambda file, out: [*inspect, *plate_flags(material, file)]),
        (PARQUET, lambda file, out: words(classify, file, out)),
        (PARQUET, lambda file, out: words(train, material.dataset, file, out)),
    ]
    for files, command in groups:
        for name, write in files.items():
            folder = reset(root)
            write(folder / name)
            yield _require_refusal(server, root, command(folder / name, root / "OUT"), name)
    for name, spoil in DATASETS.items():
        folder = Path(shutil.copytree(material.dataset, reset(root) / "data"))
        spoil(folder)
        command = words("perturbjax verify {}", folder)
        yield _require_refusal(server, root, command, f"dataset, {name}")
    build = f"data_prep build --load-data {{}} --images {{}} --out {{}} {BUILT}"
    for name, spoil in TIFFS.items():
        folder = Path(shutil.copytree(material.plates, reset(root) / "plates"))
        spoil(next(folder.rglob("*.tif*")))
        command = words(build, folder / "load_data.csv", folder, root / "OUT")
        yield _require_refusal(server, root, command, f"TIFF, {name}")


def _require_refusal(
    server: CommandServer, root: Path, command: Sequence[str], case: str
) -> Finding:
    result = server.run(Request(command, root / "work"))
    executed = (root / "work" / MARKER).exists()
    finding = make_finding("hostile file", f"{command[1]}, {case}", result, executed=executed)
    return finding.require(result.status != 0, "wrong result")


def _zipped(pickle: bytes, compression: int = zipfile.ZIP_STORED) -> Spoil:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickle)

    return write


def _bytes(data: bytes) -> Spoil:
    return lambda path: path.write_bytes(data)


def _safetensors(header: dict[str, object] | bytes, length: int | None = None) -> Spoil:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


SYSTEM = b"cposix\nsystem\nX\x0e\x00\x00\x00touch executed\x85R."
#: Nested tuples; each level contains the previous one twice, which makes 2^120 leaves.
WIDE = b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(120)) + b"K\x01s."
PTH: dict[str, Spoil] = {
    "shell command.pth": _zipped(b"\x80\x02" + SYSTEM),
    "shell command, legacy format.pth": _bytes(b"\x80\x02" + SYSTEM),
    "key nested a million times.pth": _zipped(b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."),
    "key with 2^120 leaves.pth": _zipped(WIDE),
    "pickle of 3 GB.pth": _zipped(b"\x80\x02" + b"N0" * 30_000_000, zipfile.ZIP_DEFLATED),
    "header of 2^60 bytes.safetensors": _safetensors({}, 2**60),
    "tensor of 2^60 bytes.safetensors": _safetensors(
        {"a": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}}
    ),
    "8-bit floats.safetensors": _safetensors(
        {"a": {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}}
    ),
    "nested header.safetensors": _safetensors(b"[" * 100_000),
}


def _packed_zeros(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(10**7)) * (GIGABYTE // 10**7))


CSV: dict[str, Spoil] = {
    "one gigabyte.csv.gz": _packed_zeros,
    "unterminated cell.csv": _bytes(b'Metadata_Plate,Metadata_Well\n"' + b"x" * 50_000_000),
    "half a million columns.csv": _bytes(
        b",".join(b"%d" % i for i in range(500_000)) + b"\n" + b"," * 499_999
    ),
}


def _many_rows(path: Path) -> None:
    """Write 5 * 10^7 identical rows; run-length encoding stores them in a few kilobytes."""
    one = {
        "site_id": ["a"],
        "group": ["g"],
        "part": ["train"],
        "Metadata_Plate": ["P"],
        "Metadata_Well": ["A01"],
    }
    columns = {
        name: pa.DictionaryArray.from_arrays(np.zeros(10**7, np.int32), values)
        for name, values in one.items()
    }
    table = pa.table({**columns, "Cells_f": np.zeros(10**7, np.float32)})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(5):
            writer.write_table(table)


PARQUET: dict[str, Spoil] = {"many rows.parquet": _many_rows}


def _add_code_class(folder: Path) -> None:
    described = json.loads((folder / "features.json").read_text())
    described["featuresDict"]["features"]["image"]["pythonClassName"] = "hostile_features.Feature"
    (folder / "features.json").write_text(json.dumps(described))
    for target in (folder, folder.parents[1] / "work"):
        (target / "hostile_features.py").write_text(MODULE)
    sign(folder)


def _change_columns(**columns: Callable[[pd.Series], object]) -> Spoil:
    """Change columns of the dataset index."""

    def change_index(folder: Path) -> None:
        index = pd.read_parquet(folder / "index.parquet")
        for name, change in columns.items():
            index[name] = change(index[name])
        index.to_parquet(folder / "index.parquet", index=False)
        sign(folder)

    return change_index


def _move_shard(folder: Path) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = (
        "{DATASET}/../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    sign(folder)


def sign(folder: Path) -> None:
    """Update the checksums in the provenance, as an attacker can."""
    provenance = json.loads((folder / "provenance.json").read_text())
    for name, file in provenance["files"].items():
        file.update(bytes=(folder / name).stat().st_size, sha256=file_digest(folder / name))
    provenance["content_sha256"] = content_digest(provenance["files"])
    (folder / "provenance.json").write_text(json.dumps(provenance))


DATASETS: dict[str, Spoil] = {
    "feature class with code": _add_code_class,
    "sites of 2^20 x 2^20 pixels": _change_columns(
        height=lambda _: 1 << 20, width=lambda _: 1 << 20
    ),
    "sites of 10,000 x 10,000 pixels": _change_columns(
        height=lambda _: 10_000, width=lambda _: 10_000
    ),
    "labels shifted": _change_columns(Metadata_pert_iname=lambda column: np.roll(column, 5)),
    "shard outside the folder": _move_shard,
}


def _write_huge_header(path: Path) -> None:
    """Write a few compressed bytes under a header of 60,000 x 60,000 pixels."""
    strip = zlib.compress(bytes(1000))
    tags = [
        (256, 4, 60_000),
        (257, 4, 60_000),
        (258, 3, 16),
        (259, 3, 8),
        (262, 3, 1),
        (273, 4, 200),
    ]
    tags += [(277, 3, 1), (278, 4, 60_000), (279, 4, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    path.write_bytes(header.ljust(200, b"\0") + strip)


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TIFFS: dict[str, Spoil] = {
    "60,000 x 60,000 pixels": _write_huge_header,
    "named pipe": _replace_by_pipe,
}
