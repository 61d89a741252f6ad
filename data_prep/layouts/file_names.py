"""File names of microscopes: fields such as well, site and channel in a path.

A pattern is a path with fields in braces, for example `{plate}_{well}_s{site}_w{channel}.tif`. A
pattern without a slash describes the file name, and one with slashes the end of the path. `*`
stands for any text without a slash. Upper and lower case are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from perturbjax.core.errors import InputError
from perturbjax.core.plates import normalize_well

#: Field of a pattern -> regular expression of its values.
FIELDS = {
    "plate": r"[^/]+?",
    # Without `_` between letter and number, because it usually separates fields.
    "well": r"(?:[a-z]|a[a-f])[ -]*[0-9]{1,2}|r[0-9]{1,2}c[0-9]{1,2}",
    "row": r"[a-z]|a[a-f]|[0-9]{1,2}",
    "column": r"[0-9]{1,2}",
    "site": r"[0-9]+",
    "channel": r"[^/]+?",
    "z": r"[0-9]+",
    "time": r"[^/]+?",
}


@dataclass(frozen=True)
class ImageFile:
    """An image and its position, as its name or the metadata of the microscope state them.

    Attributes:
        path: Path below the images folder, with slashes.
        plate: Plate; empty if the file name has none.
        well: Well in the standard spelling (`A01`).
        site: Site (field of view).
        channel: Number or name of the channel in the file name.
        z: Focal plane.
        time: Time point.
        channel_name: Name of the channel in the metadata, if they have one.
    """

    path: str
    plate: str
    well: str
    site: str = "1"
    channel: str = "1"
    z: str = "1"
    time: str = "1"
    channel_name: str = ""


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Convert a pattern to a regular expression with one group per field.

    Raises:
        InputError: A field is unknown, or the pattern has no well.
    """
    parts, used = [], set()
    for text in re.split(r"(\{[^{}]*\}|\*)", pattern):
        name = text[1:-1]
        if text == "*":
            parts.append(r"[^/]*?")
        elif not re.fullmatch(r"\{[^{}]*\}", text):
            parts.append(re.escape(text))
        elif name not in FIELDS:
            fields = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise InputError(f"--pattern {pattern}: {text} is not a field; use {fields} or *")
        else:
            # A repeated field must have the same value, for example in a folder and a file name.
            parts.append(f"(?P={name})" if name in used else f"(?P<{name}>{FIELDS[name]})")
            used.add(name)
    if "well" not in used and not {"row", "column"} <= used:
        raise InputError(
            f"--pattern {pattern}: has no well; add {{well}}, or {{row}} and {{column}}"
        )
    return re.compile("".join(parts), re.IGNORECASE)


def match_path(pattern: re.Pattern[str], path: str) -> ImageFile | None:
    """Read the fields of a path; None if it does not match.

    Args:
        pattern: Groups are fields; a pattern without slashes is compared with the file name only.
        path: Path below the images folder.
    """
    folders = pattern.pattern.count("/") - pattern.pattern.count("[^/]")
    end = "/".join(path.rsplit("/", folders + 1)[-folders - 1 :])
    if (match := pattern.fullmatch(end)) is None:
        return None
    values = {name: value for name, value in match.groupdict().items() if value is not None}
    row, column = values.pop("row", ""), values.pop("column", "")
    if "well" not in values:
        values["well"] = f"r{row}c{column}" if row.isdecimal() else f"{row}{column}"
    values["well"] = normalize_well(values["well"])
    for name in ("site", "z", "channel"):
        # Numbers without leading zeros, as `build` reads them.
        if (value := values.get(name, "1")).isdecimal():
            values[name] = str(int(value))
    return ImageFile(path, **{"plate": "", **values})


def example_pattern(pattern: re.Pattern[str], path: str, fixed: str) -> str:
    """Write a pattern for paths like the given one, in which one field keeps its value.

    Args:
        pattern: Regular expression that matches the path.
        path: Path below the images folder.
        fixed: Field that keeps its value.
    """
    name = PurePosixPath(path).name
    if (match := pattern.fullmatch(name)) is None:
        return name
    text, position = "", 0
    for field, value in sorted(match.groupdict().items(), key=lambda item: match.start(item[0])):
        if value is not None and field != fixed:
            text += name[position : match.start(field)] + f"{{{field}}}"
            position = match.end(field)
    return text + name[position:]
