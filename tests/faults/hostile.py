"""The storm of hostile files: small ones that would run something, never end, or fill the memory of their reader."""

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
from tests.faults.arena import Arena, Order
from tests.faults.material import BUILT, Material, read_plates
from tests.faults.outcomes import Finding, finding

#: What a hostile file would leave behind in the working folder if it were run.
MARKER = "executed"
#: A class that TFDS would import; importing it leaves the marker.
MODULE = f"open({MARKER!r}, 'w').close()\nclass Feature: pass\n"
Command = Callable[[Path, Path], Sequence[object]]
GIGABYTE = 10**9


def hostile_files(arena: Arena, made: Material, root: Path) -> Iterator[Finding]:
    """Each of them through the command that reads its kind, which must refuse it in one line."""
    train, classify = (
        ("perturbjax", "train", "--data", made.dataset),
        ("perturbjax", "classify", "--models", "lda"),
    )
    kinds: list[tuple[dict[str, Callable[[Path], None]], Command]] = [
        (PTH, lambda file, out: ("perturbjax", "import-torch", "--checkpoint", file, "--out", out)),
        (CSV, lambda file, out: ("data_prep", "inspect", *read_plates(made, file))),
        (PARQUET, lambda file, out: (*classify, "--features", file, "--out", out)),
        (PARQUET, lambda file, out: (*train, "--split-file", file, "--out", out)),
    ]
    for files, command in kinds:
        for name, write in files.items():
            folder = _fresh(root)
            write(folder / name)
            yield _refused(arena, root, command(folder / name, root / "OUT"), name)
    for what, spoil in DATASETS.items():
        folder = Path(shutil.copytree(made.dataset, _fresh(root) / "data"))
        spoil(folder)
        yield _refused(arena, root, ("perturbjax", "verify", folder), f"dataset, {what}")
    for what, spoil in TIFFS.items():
        folder = Path(shutil.copytree(made.plates, _fresh(root) / "plates"))
        spoil(next(folder.rglob("*.tif*")))
        read = ("--load-data", folder / "load_data.csv", "--images", folder)
        yield _refused(
            arena,
            root,
            ("data_prep", "build", *read, "--out", root / "OUT", *BUILT),
            f"TIFF, {what}",
        )


def _fresh(root: Path) -> Path:
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (root / "work").mkdir()
    (root / "files").mkdir()
    return root / "files"


def _refused(arena: Arena, root: Path, command: Sequence[object], what: str) -> Finding:
    ended = arena.run(Order(command, root / "work"))
    executed = (root / "work" / MARKER).exists()
    return finding("hostile file", f"{command[1]}, {what}", ended, executed=executed).unless(
        ended.status != 0, "silently different"
    )


def _zipped(pickle: bytes, packed: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", packed) as archive:
            archive.writestr("archive/data.pkl", pickle)

    return write


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(data), None)[1]


def _safetensors(
    header: dict[str, object] | bytes, length: int | None = None
) -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))


SYSTEM = b"cposix\nsystem\nX\x0e\x00\x00\x00touch executed\x85R."
#: Every level holds the one below twice: 2^120 leaves.
WIDE = b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(120)) + b"K\x01s."
PTH: dict[str, Callable[[Path], None]] = {
    "runs a shell.pth": _zipped(b"\x80\x02" + SYSTEM),
    "runs a shell, legacy.pth": _bytes(b"\x80\x02" + SYSTEM),
    "a key a million deep.pth": _zipped(b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."),
    "a key without end.pth": _zipped(WIDE),
    "a pickle of 3 GB.pth": _zipped(b"\x80\x02" + b"N0" * 30_000_000, zipfile.ZIP_DEFLATED),
    "a header of 2^60 bytes.safetensors": _safetensors({}, 2**60),
    "a tensor of 2^60 bytes.safetensors": _safetensors(
        {"a": {"dtype": "F32", "shape": [2**58], "data_offsets": [0, 2**60]}}
    ),
    "floats of 8 bits.safetensors": _safetensors(
        {"a": {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}}
    ),
    "a deep header.safetensors": _safetensors(b"[" * 100_000),
}


def _packed_zeros(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(10**7)) * (GIGABYTE // 10**7))


CSV: dict[str, Callable[[Path], None]] = {
    "a gigabyte.csv.gz": _packed_zeros,
    "a cell without end.csv": _bytes(b'Metadata_Plate,Metadata_Well\n"' + b"x" * 50_000_000),
    "half a million columns.csv": _bytes(
        b",".join(b"%d" % i for i in range(500_000)) + b"\n" + b"," * 499_999
    ),
}


def _many_rows(path: Path) -> None:
    """5 * 10^7 rows that are nothing but run lengths: some kilobytes."""
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


PARQUET: dict[str, Callable[[Path], None]] = {"many rows.parquet": _many_rows}


def _named_class(folder: Path) -> None:
    described = json.loads((folder / "features.json").read_text())
    described["featuresDict"]["features"]["image"]["pythonClassName"] = "hostile_features.Feature"
    (folder / "features.json").write_text(json.dumps(described))
    for place in (folder, folder.parents[1] / "work"):
        (place / "hostile_features.py").write_text(MODULE)
    sign(folder)


def _indexed(**columns: Callable[[pd.Series], object]) -> Callable[[Path], None]:
    """Change columns of the index."""

    def spoil(folder: Path) -> None:
        index = pd.read_parquet(folder / "index.parquet")
        for name, change in columns.items():
            index[name] = change(index[name])
        index.to_parquet(folder / "index.parquet", index=False)
        sign(folder)

    return spoil


def _shard_elsewhere(folder: Path) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = (
        "{DATASET}/../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    )
    (folder / "dataset_info.json").write_text(json.dumps(info))
    sign(folder)


def sign(folder: Path) -> None:
    """Make the digests in the provenance those of the files there: whoever is hostile can do so too."""
    provenance = json.loads((folder / "provenance.json").read_text())
    for name, file in provenance["files"].items():
        file.update(bytes=(folder / name).stat().st_size, sha256=file_digest(folder / name))
    provenance["content_sha256"] = content_digest(provenance["files"])
    (folder / "provenance.json").write_text(json.dumps(provenance))


DATASETS: dict[str, Callable[[Path], None]] = {
    "features of a class of its own": _named_class,
    "sites of 2^20 x 2^20 pixels": _indexed(height=lambda _: 1 << 20, width=lambda _: 1 << 20),
    "sites of 10,000 x 10,000 pixels": _indexed(height=lambda _: 10_000, width=lambda _: 10_000),
    "labels rolled": _indexed(Metadata_pert_iname=lambda column: np.roll(column, 5)),
    "a shard elsewhere": _shard_elsewhere,
}


def _claims_60000(path: Path) -> None:
    """One deflated strip of some bytes, under a header of 60,000 x 60,000 pixels."""
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


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TIFFS: dict[str, Callable[[Path], None]] = {
    "60,000 x 60,000 pixels": _claims_60000,
    "a pipe": _pipe,
}
