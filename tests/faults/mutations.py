"""Damage the bytes of a file.

A mutation receives bytes and a random generator, and returns other bytes, or None if it does not
apply.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from random import Random

Mutation = Callable[[bytes, Random], bytes | None]


def flip_bit(data: bytes, random: Random) -> bytes | None:
    if not data:
        return None
    start = random.randrange(len(data))
    return data[:start] + bytes([data[start] ^ (1 << random.randrange(8))]) + data[start + 1 :]


def truncate(data: bytes, random: Random) -> bytes | None:
    return data[: random.randrange(len(data))] if data else None


def truncate_at_block(data: bytes, random: Random) -> bytes | None:
    """Truncate at a multiple of 64 KiB or 512 bytes (blocks of ArrayRecord and file systems)."""
    for block in (65536, 512):
        if len(data) > block:
            return data[: block * random.randrange(1, -(-len(data) // block))]
    return None


def zero_range(data: bytes, random: Random) -> bytes | None:
    if len(data) < 16:
        return None
    start, length = random.randrange(len(data)), random.choice([8, 64, 512])
    damaged = data[:start] + bytes(min(length, len(data) - start)) + data[start + length :]
    return None if damaged == data else damaged


def repeat_range(data: bytes, random: Random) -> bytes | None:
    if len(data) < 16:
        return None
    start, length = random.randrange(len(data)), random.choice([8, 64, 512])
    return data[: start + length] + data[start:]


def append_noise(data: bytes, random: Random) -> bytes:
    return data + random.randbytes(random.choice([1, 16, 4096]))


def empty(data: bytes, random: Random) -> bytes:
    return b""


def noise(data: bytes, random: Random) -> bytes:
    return random.randbytes(max(len(data), 16))


def insert_nul(data: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + b"\0" + data[start:]


BYTES: dict[str, Mutation] = {
    "bit flipped": flip_bit,
    "truncated": truncate,
    "truncated at a block": truncate_at_block,
    "range zeroed": zero_range,
    "range repeated": repeat_range,
    "noise appended": append_noise,
    "emptied": empty,
    "noise": noise,
    "NUL inserted": insert_nul,
}


def json_of_other_type(data: bytes, random: Random) -> bytes:
    return random.choice(
        [b"[]", b"{}", b"null", b"3", b'"text"', b"[[[]]]", b'{"a": 1}', b"true", b"1e999", b"NaN"]
    )


def json_too_deep(data: bytes, random: Random) -> bytes:
    return random.choice([b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000])


def json_value_changed(data: bytes, random: Random) -> bytes | None:
    """Replace a random leaf by another value."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    leaves: list[tuple[dict | list, str | int]] = []

    def visit(item: object) -> None:
        pairs = (
            item.items()
            if isinstance(item, dict)
            else enumerate(item)
            if isinstance(item, list)
            else ()
        )
        for key, inner in pairs:
            leaves.append((item, key))
            visit(inner)

    visit(value)
    if not leaves:
        return None
    holder, key = random.choice(leaves)
    other = random.choice([None, [], {}, "x", -1, 1e308, True, "../../etc/passwd", "os.system"])
    if type(other) is type(holder[key]) and other == holder[key]:
        return None
    holder[key] = other
    return json.dumps(value).encode()


JSON: dict[str, Mutation] = {
    **BYTES,
    "JSON of another type": json_of_other_type,
    "JSON too deep": json_too_deep,
    "JSON value changed": json_value_changed,
}


def _rows(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode())))


def _text(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def shorten_row(data: bytes, random: Random) -> bytes:
    rows = _rows(data)
    row = rows[random.randrange(1, len(rows))]
    del row[random.randrange(1, len(row)) :]
    return _text(rows)


def lengthen_row(data: bytes, random: Random) -> bytes:
    rows = _rows(data)
    rows[random.randrange(1, len(rows))].append("more")
    return _text(rows)


def duplicate_header(data: bytes, random: Random) -> bytes:
    rows = _rows(data)
    one, other = random.sample(range(len(rows[0])), 2)
    rows[0][one] = rows[0][other]
    return _text(rows)


def drop_required_column(data: bytes, random: Random) -> bytes:
    rows = _rows(data)
    names = (
        "Metadata_Plate",
        "Metadata_Well",
        "Metadata_Site",
        "FileName_OrigDNA",
        "PathName_OrigDNA",
    )
    column = rows[0].index(random.choice([name for name in names if name in rows[0]]))
    return _text([row[:column] + row[column + 1 :] for row in rows])


def empty_cell(data: bytes, random: Random) -> bytes:
    rows = _rows(data)
    names = [
        i
        for i, name in enumerate(rows[0])
        if name.startswith(("FileName", "Metadata_Plate", "Metadata_Well"))
    ]
    rows[random.randrange(1, len(rows))][random.choice(names)] = random.choice(
        ["", " ", "\t", "\u200b"]
    )
    return _text(rows)


def duplicate_row(data: bytes, random: Random) -> bytes:
    rows = _rows(data)
    return _text([*rows, rows[random.randrange(1, len(rows))]])


def invalid_value(data: bytes, random: Random) -> bytes:
    rows = _rows(data)
    values = [
        "../../../etc/passwd",
        "²",
        "-1",
        "1e9",
        "NaN",
        "A0",
        "ZZ99",
        "\0",
        "x" * 100_000,
        "\r",
        '"',
    ]
    names = ("Metadata_Well", "Metadata_Site", "FileName_OrigDNA", "PathName_OrigDNA")
    column = rows[0].index(random.choice([name for name in names if name in rows[0]]))
    rows[random.randrange(1, len(rows))][column] = random.choice(values)
    return _text(rows)


#: Damage to a table; the command must refuse it unless the rest is still a valid table.
CSV: dict[str, Mutation] = {
    **BYTES,
    "short row": shorten_row,
    "long row": lengthen_row,
    "duplicate header": duplicate_header,
    "column dropped": drop_required_column,
    "empty cell": empty_cell,
    "duplicate row": duplicate_row,
    "invalid value": invalid_value,
}


def change_number(data: bytes, random: Random) -> bytes | None:
    """Replace a cell of a CSV table by another value."""
    try:
        rows = _rows(data)
    except (UnicodeDecodeError, csv.Error):
        return None
    if len(rows) < 2 or not rows[0]:
        return None
    row = rows[random.randrange(len(rows))]
    if not row:
        return None
    values = ["x", "", "-1", "1e999", "nan", "9" * 400, "0.5", "=1", "é"]
    row[random.randrange(len(row))] = random.choice(values)
    return _text(rows)


def other_header(data: bytes, random: Random) -> bytes:
    return b"a,b\n" + data


#: Damage to tables of scores.
TABLE: dict[str, Mutation] = {"cell changed": change_number, "other header": other_header}
#: Other spellings of the same table; the result must not change.
CSV_SAME: dict[str, Mutation] = {
    "CRLF": lambda data, random: data.replace(b"\n", b"\r\n"),
    "all quoted": lambda data, random: b"\n".join(
        b",".join(b'"' + cell.encode().replace(b'"', b'""') + b'"' for cell in row)
        for row in _rows(data)
    ),
    "byte order mark": lambda data, random: b"\xef\xbb\xbf" + data,
    "no last newline": lambda data, random: data.rstrip(b"\n"),
}


def is_valid_csv(data: bytes) -> bool:
    """Return whether the table is valid CSV: equal row widths, unique headers, no NUL."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error):
        return False
    rows = [row for row in rows if row]
    return (
        b"\0" not in data
        and len(rows) > 1
        and len({len(row) for row in rows}) == 1 == len({*rows[0]}) // len(rows[0])
    )
