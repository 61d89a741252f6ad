"""Metadata of microscopes: names of plates and channels, and lists of images."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from data_prep.layouts.file_names import ImageFile
from data_prep.layouts.safe_xml import read_records
from perturbjax.core.errors import InputError
from perturbjax.core.plates import well_name

#: Maximum size in bytes of an HTD file, which has some kilobytes.
_LARGEST_HTD = 1 << 20


@dataclass
class LayoutImages:
    """Images of a folder, in one layout.

    Attributes:
        images: One record per image.
        absent: Images that the metadata name but that do not exist.
        notes: Sentences for the user.
    """

    images: list[ImageFile]
    absent: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _line(text: str) -> str:
    """Replace line breaks and repeated spaces by single spaces."""
    return " ".join(text.split())


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def files_named(files: Sequence[str], *names: str) -> list[str]:
    """Files whose names end in one of the given texts, ignoring upper and lower case."""
    return [path for path in files if PurePosixPath(path).name.lower().endswith(names)]


def _well(row: str, column: str) -> str:
    """Name a well by its row and column, counted from 1.

    Raises:
        ValueError: They are not numbers, or not on a plate.
    """
    position = int(row), int(column)
    if not (1 <= position[0] <= 32 and 1 <= position[1] <= 99):
        raise ValueError(f"row {row}, column {column}")
    return well_name(position[0] - 1, position[1] - 1)


def _plate_folder(root: Path, path: str, skipped: str) -> str:
    """Return the nearest folder of an image that is not one of the fixed folders of a layout."""
    parts = [*root.resolve().parts, *PurePosixPath(path).parts[:-1]]
    names = [part for part in parts if not re.fullmatch(skipped, part, re.IGNORECASE)]
    return names[-1] if names else "plate"


def _name_plates(root: Path, images: list[ImageFile], skipped: str = "images?") -> list[ImageFile]:
    """Name plates by their folders if the file names have no plate."""
    return [
        image if image.plate else replace(image, plate=_plate_folder(root, image.path, skipped))
        for image in images
    ]


def by_folder(root: Path, files: Sequence[str], images: list[ImageFile]) -> LayoutImages:
    """Use the file names only; plates without a name are named by their folders."""
    return LayoutImages(_name_plates(root, images))


# Opera Phenix and Operetta


def describe_phenix(root: Path, files: Sequence[str], images: list[ImageFile]) -> LayoutImages:
    """Read Index.xml; without it, plates are the folders up to `__` and channels are numbers."""
    described = LayoutImages([])
    existing, indexed = set(files), set()
    for index in files_named(
        files, "index.xml", "index.idx.xml", "index.ref.xml", "index.columbusidx.xml"
    ):
        records = read_records(root / index, {"Image", "Entry", "PlateID"})
        names = {
            r["ChannelID"]: r["ChannelName"]
            for t, r in records
            if "ChannelName" in r and "ChannelID" in r
        }
        plate = next((_line(record[""]) for tag, record in records if tag == "PlateID"), "")
        for tag, record in records:
            if tag != "Image" or not record.get("URL"):
                continue
            image = _phenix_image(record, names, plate, _folder(index), existing)
            if image.path in indexed:  # a second index with the flat-field profiles
                continue
            indexed.add(image.path)
            if image.path in existing:
                described.images.append(image)
            else:
                described.absent.append(image.path)
    rest = [image for image in images if image.path not in indexed]
    for image in rest:
        plate = _plate_folder(root, image.path, "images?").partition("__")[0]
        described.images.append(replace(image, plate=plate))
    return described


def _phenix_image(
    record: dict[str, str], names: dict[str, str], plate: str, folder: str, existing: set[str]
) -> ImageFile:
    name = PurePosixPath(record["URL"].replace("\\", "/")).name
    # The index is in the folder of the images or in its parent.
    paths = ["/".join(part for part in (folder, sub, name) if part) for sub in ("", "Images")]
    try:
        well = _well(record["Row"], record["Col"])
        channel = record["ChannelID"]
        return ImageFile(
            next((path for path in paths if path in existing), paths[0]),
            plate,
            well,
            str(int(record.get("FieldID", "1"))),
            channel,
            str(int(record.get("PlaneID", "1"))),
            record.get("TimepointID", "1"),
            record.get("ChannelName") or names.get(channel, ""),
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"Index.xml of {folder or 'the images folder'}: {name} has no valid Row, Col, FieldID, "
            f"PlaneID or ChannelID ({error}); export it again, or remove the index to use the file "
            "names"
        ) from error


# ImageXpress


def describe_imagexpress(root: Path, files: Sequence[str], images: list[ImageFile]) -> LayoutImages:
    """Read wave names from HTD files; time points and focal planes can be folders."""
    waves = {_folder(path): _read_htd(root / path) for path in files_named(files, ".htd")}
    described = LayoutImages([])
    for image in images:
        # Small copies of the images.
        if "_thumb" in image.path.lower():
            continue
        for attribute, name in (("time", "TimePoint_"), ("z", "ZStep_")):
            if match := re.search(rf"(?:^|/){name}(\d+)/", image.path, re.IGNORECASE):
                image = replace(image, **{attribute: str(int(match[1]))})
        folder = _folder(image.path)
        while folder and folder not in waves:
            folder = _folder(folder)
        name = waves.get(folder, {}).get(image.channel, "")
        described.images.append(replace(image, channel_name=name))
    described.images = _name_plates(root, described.images, r"images?|(TimePoint|ZStep)_\d+")
    return described


def _read_htd(path: Path) -> dict[str, str]:
    """Return the wave names of an HTD file: number -> name."""
    try:
        # Reading a pipe or a device could block forever.
        if not path.is_file():
            raise InputError(f"{path}: is not a file")
        with open(path, "rb") as file:
            text = file.read(_LARGEST_HTD).decode("latin-1")
        rows = list(csv.reader(text.splitlines(), skipinitialspace=True))
    except (OSError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); export it again") from error
    return {
        row[0].removeprefix("WaveName"): row[1].strip()
        for row in rows
        if len(row) > 1 and re.fullmatch(r"WaveName\d+", row[0])
    }


# Yokogawa CV7000 and CV8000


def describe_yokogawa(root: Path, files: Sequence[str], images: list[ImageFile]) -> LayoutImages:
    """Read MeasurementData.mlf, the plate of MeasurementDetail.mrf and the channels of a .mes."""
    described = LayoutImages([])
    existing, listed, errors = set(files), set(), []
    for index in files_named(files, "measurementdata.mlf"):
        folder = _folder(index)
        neighbors = [path for path in files if _folder(path) == folder]
        plate = _first_plate(root, neighbors)
        names = _yokogawa_channels(root, neighbors)
        for _, record in read_records(root / index, {"MeasurementRecord"}):
            if record.get("Type") != "IMG":  # ERR: for example a failed autofocus
                errors.append(record[""])
                continue
            path = "/".join(
                p for p in (folder, PurePosixPath(record[""].replace("\\", "/")).name) if p
            )
            listed.add(path)
            if path not in existing:
                described.absent.append(path)
                continue
            described.images.append(_yokogawa_image(record, path, plate, names, index))
    described.images += [image for image in images if image.path not in listed]
    if errors:
        described.notes.append(
            f"the microscope reported {len(errors)} errors, for example {errors[0]!r}"
        )
    described.images = _name_plates(root, described.images)
    return described


def _yokogawa_image(
    record: dict[str, str], path: str, plate: str, names: dict[str, str], index: str
) -> ImageFile:
    try:
        channel = str(int(record["Ch"]))
        return ImageFile(
            path,
            plate,
            _well(record["Row"], record["Column"]),
            str(int(record["FieldIndex"])),
            channel,
            str(int(record.get("ZIndex", "1"))),
            record.get("TimePoint", "1"),
            names.get(channel, ""),
        )
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{index}: the record of {path} has no valid Row, Column, FieldIndex or Ch ({error}); "
            "remove the file to use the file names"
        ) from error


def _first_plate(root: Path, files: Sequence[str]) -> str:
    for path in files_named(files, ".mrf"):
        for _, record in read_records(root / path, {"MeasurementSamplePlate"}):
            return _line(record.get("Name", ""))
    return ""


def _yokogawa_channels(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Return the targets of the channels in a measurement setting: number -> name."""
    return {
        str(int(record["Ch"])): record["Target"]
        for path in files_named(files, ".mes")
        for _, record in read_records(root / path, {"Channel"})
        if record.get("Target") and re.fullmatch(r"\d{1,4}", record.get("Ch", ""))
    }


# Olympus ScanR


def describe_scanr(root: Path, files: Sequence[str], images: list[ImageFile]) -> LayoutImages:
    """Read plate name and columns from experiment_descriptor.xml, for names without a well."""
    descriptors = {}
    for path in files_named(files, "experiment_descriptor.xml"):
        # The program does not declare the encoding, although it writes Latin-1.
        records = read_records(root / path, {"Name", "Val"}, "iso-8859-1")
        descriptors[_folder(path)] = _scanr_descriptor(records)
    described = LayoutImages([])
    for image in images:
        folder = _folder(image.path)
        if folder not in descriptors:
            folder = _folder(folder)  # images are in the folder `data` of the experiment
        plate, columns = descriptors.get(folder, ("", 0))
        name = PurePosixPath(image.path).name
        if name.startswith("--"):
            number = int(name[3:8])
            if not columns:
                raise InputError(
                    f"{image.path}: has the number of a well, not its name; copy "
                    "experiment_descriptor.xml, which states the format of the plate, next to the "
                    "folder of the images"
                )
            row, column = divmod(number - 1, columns)
            try:
                image = replace(image, well=_well(str(row + 1), str(column + 1)))
            except ValueError as error:
                raise InputError(
                    f"{image.path}: well {number} is not on a plate with {columns} columns"
                ) from error
        described.images.append(replace(image, plate=plate, channel_name=image.channel))
    described.images = _name_plates(root, described.images, "data")
    return described


def _scanr_descriptor(records: Sequence[tuple[str, dict[str, str]]]) -> tuple[str, int]:
    """Return plate name and number of columns; "" and 0 if they are absent."""
    name, plate, columns, in_format = "", "", 0, False
    for tag, record in records:
        text = record[""]
        if tag == "Name":
            name = text
            in_format |= name == "format typedef"
        elif name == "plate name":
            plate = _line(text)
        elif in_format and name == "Columns" and re.fullmatch(r"[1-9]\d?", text):
            columns, in_format = int(text), False
    return plate, columns


# Incucyte

_INCUCYTE_CHANNEL = r"phase|green|red|nir|orange"


def describe_incucyte(root: Path, files: Sequence[str], images: list[ImageFile]) -> LayoutImages:
    """Read the channel from the name or the folder; raw archives have dates as folders."""
    described = []
    for image in images:
        folders, name = image.path.split("/")[:-1], PurePosixPath(image.path).name
        if re.match(r"[A-Z]\d+-", name, re.IGNORECASE):
            # EssenFiles/ScanData/YYMM/DD/HHMM/VESSEL/A1-1-Ph.tif
            dates = [*root.resolve().parts, *folders]
            image = replace(image, plate=dates[-1], time="-".join(dates[-4:-1]))
        else:
            words = [*image.plate.split("_"), *reversed(folders)]
            channel = next((w for w in words if re.fullmatch(_INCUCYTE_CHANNEL, w, re.I)), "1")
            # Without the channel, all channels have the same plate.
            plate = "_".join(w for w in image.plate.split("_") if w != channel)
            image = replace(image, channel=channel.capitalize(), plate=plate)
        name = "" if image.channel.isdigit() else image.channel
        described.append(replace(image, channel_name=name))
    return LayoutImages(_name_plates(root, described, _INCUCYTE_CHANNEL))


def describe_incell(root: Path, files: Sequence[str], images: list[ImageFile]) -> LayoutImages:
    images = [replace(image, channel_name=image.channel) for image in images]
    return LayoutImages(_name_plates(root, images))
