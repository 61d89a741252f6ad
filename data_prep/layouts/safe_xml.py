"""Read XML metadata of microscopes without entities, with bounded size and depth."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from perturbjax.core.errors import InputError

#: Maximum size of a file in bytes. The index of 384 wells with 9 sites and 8 channels has 47 MB.
LARGEST_XML = 1 << 30
#: Maximum number of nested elements.
DEEPEST = 100
_CHUNK = 1 << 20

#: Tag, attributes and texts of the direct children of an element; its own text is under "".
Record = tuple[str, dict[str, str]]


def read_records(path: Path, tags: Collection[str], encoding: str | None = None) -> list[Record]:
    """Read all elements with the given tags, in the order in which they end.

    Namespaces are removed from tags and attributes. Document types are refused, because they can
    define entities that expand to any size or name other files.

    Args:
        path: XML file.
        tags: Tags of the elements to return.
        encoding: Encoding that replaces the declared one.

    Raises:
        InputError: The file cannot be read, is too large, is not XML or has a document type.
    """
    records: list[Record] = []
    #: Open elements: tag, record and pieces of text.
    stack: list[tuple[str, dict[str, str], list[str]]] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(stack) >= DEEPEST:
            raise InputError(f"{path}: elements are nested more than {DEEPEST} times")
        values = {_local(name): value for name, value in attributes.items()}
        stack.append((_local(tag), values, []))

    def end(_: str) -> None:
        tag, values, pieces = stack.pop()
        text = "".join(pieces).strip()
        if stack:
            # The first child of a name counts, so that a later one cannot replace it.
            stack[-1][1].setdefault(tag, text)
        if tag in tags:
            records.append((tag, {**values, "": text}))

    def refuse(*_: Any) -> None:
        raise InputError(f"{path}: has a document type (DOCTYPE), which no microscope writes")

    parser = expat.ParserCreate(encoding)
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = lambda text: stack[-1][2].append(text) if stack else None
    parser.StartDoctypeDeclHandler = refuse
    try:
        for chunk in _chunks(path):
            parser.Parse(chunk, False)
        parser.Parse(b"", True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise InputError(f"{path}: is not valid XML ({error}); export it again") from error
    return records


def _local(name: str) -> str:
    """Return a name without its namespace prefix: `bts:Row` becomes `Row`."""
    return name.rpartition(":")[2]


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        # Reading a pipe or a device could block forever.
        if not path.is_file():
            raise InputError(f"{path}: is not a file")
        if os.path.getsize(path) > LARGEST_XML:
            raise InputError(f"{path}: is larger than {LARGEST_XML >> 20} MB")
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
