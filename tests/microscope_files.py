"""Write small ND2, CZI and LIF files. Pixels have the axes (scene, channel, z, height, width)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_czi(path: Path, pixels: np.ndarray, names: Sequence[str], skip: Any = None) -> Path:
    """Write a CZI with the library of Zeiss; the plane `skip` (scene, channel, z) is left out."""
    from pylibCZIrw import czi

    with czi.create_czi(str(path)) as file:
        for scene, channel, depth in np.ndindex(pixels.shape[:3]):
            if (scene, channel, depth) == skip:
                continue
            file.write(
                data=np.ascontiguousarray(pixels[scene, channel, depth][..., None]),
                plane={"C": channel, "Z": depth},
                scene=scene,
                location=(scene * 1000, 0),
            )
        file.write_metadata(path.stem, channel_names=dict(enumerate(names)))
    return path


def write_lif(path: Path, pixels: np.ndarray, pixel_size: float = 1.0) -> Path:
    """Write a LIF of version 2: one image per scene, planes in the order channel, z."""
    scenes, channels, depth, height, width = pixels.shape
    size, plane = pixels.itemsize, height * width * pixels.itemsize
    described = "".join(
        f'<ChannelDescription DataType="0" ChannelTag="0" Resolution="{8 * size}" '
        f'NameOfMeasuredQuantity="" Min="0" Max="1" Unit="" LUTName="Gray" IsLUTInverted="0" '
        f'BytesInc="{channel * depth * plane}" BitInc="0"/>'
        for channel in range(channels)
    )
    steps = {1: (width, size), 2: (height, width * size), 3: (depth, plane)}
    axes = "".join(
        f'<DimensionDescription DimID="{axis}" NumberOfElements="{count}" Origin="0" '
        f'Length="{pixel_size * (count - 1)}" '
        f'Unit="m" BytesInc="{step}" BitInc="0"/>'
        for axis, (count, step) in steps.items()
    )
    images = "".join(
        f'<Element Name="Well {scene}" UniqueID="{scene}"><Data><Image><ImageDescription><Channels>'
        f"{described}</Channels><Dimensions>{axes}</Dimensions></ImageDescription></Image></Data>"
        f'<Memory Size="{pixels[0].nbytes}" MemoryBlockID="Block_{scene}"/></Element>'
        for scene in range(scenes)
    )
    xml = (
        '<LMSDataContainerHeader Version="2"><Element Name="plate" UniqueID="x"><Children>'
        f"{images}</Children></Element></LMSDataContainerHeader>"
    )
    content = struct.pack("<IIBI", 0x70, 2 * len(xml) + 5, 0x2A, len(xml)) + xml.encode("utf-16-le")
    for scene in range(scenes):
        name = f"Block_{scene}"
        content += struct.pack(
            "<IIBQBI", 0x70, 0, 0x2A, pixels[scene].nbytes, 0x2A, len(name)
        ) + name.encode("utf-16-le")
        content += np.ascontiguousarray(pixels[scene]).tobytes()
    path.write_bytes(content)
    return path


def write_nd2(
    path: Path, pixels: np.ndarray, names: Sequence[str], skip: int = -1, pixel_size: float = 0.0
) -> Path:
    """Write an ND2 of version 3: one frame per scene and z; frame `skip` is left out."""
    scenes, channels, depth, height, width = pixels.shape
    bits = 8 * pixels.itemsize
    attributes = {
        "uiWidth": width,
        "uiWidthBytes": width * channels * pixels.itemsize,
        "uiHeight": height,
        "uiComp": channels,
        "uiBpcInMemory": bits,
        "uiBpcSignificant": bits,
        "uiSequenceCount": scenes * depth,
        "eCompression": 2,
    }
    planes = {
        f"a{number}": {
            "uiCompCount": 1,
            "sDescription": name,
            "pFluorescentProbe": {"m_ExcitationSpectrum": {"uiCount": 0}},
        }
        for number, name in enumerate(names)
    }
    picture = {
        "bCalibrated": int(pixel_size > 0),
        "dCalibration": pixel_size or 1.0,
        "sPicturePlanes": {"uiCount": channels, "sPlaneNew": planes},
    }
    points = {
        f"i{number:010}": {"dPosX": 0.0, "dPosY": 0.0, "dPosZ": 0.0} for number in range(scenes)
    }
    stack = {"eType": 4, "uLoopPars": {"uiCount": depth, "dZStep": 1.0}}
    positions = {"eType": 2, "uLoopPars": {"Points": points}, "ppNextLevelEx": {"i0": stack}}
    chunks = {
        "ImageAttributesLV!": _variant("SLxImageAttributes", attributes),
        "ImageMetadataSeqLV|0!": _variant("SLxPictureMetadata", picture),
        "ImageMetadataLV!": _variant("SLxExperiment", positions),
    }
    for frame in range(scenes * depth):
        if frame != skip:
            scene, z = divmod(frame, depth)
            image = np.ascontiguousarray(np.moveaxis(pixels[scene, :, z], 0, -1))
            chunks[f"ImageDataSeq|{frame}!"] = bytes(8) + image.tobytes()  # after a time stamp
    content = _chunk("ND2 FILE SIGNATURE CHUNK NAME01!", b"Ver3.0".ljust(64, b"\0"), 32)
    listing = b""
    for name, data in chunks.items():
        listing += name.encode() + struct.pack("<QQ", len(content), len(data))
        content += _chunk(name, data, 4072)
    end = b"ND2 CHUNK MAP SIGNATURE 0000001!"
    start = len(content)
    content += _chunk("ND2 FILEMAP SIGNATURE NAME 0001!", listing + end + bytes(16), 32)
    path.write_bytes(content + end + struct.pack("<Q", start))
    return path


def _chunk(name: str, data: bytes, reserved: int) -> bytes:
    header = struct.pack("<IIQ", 0x0ABECEDA, reserved, len(data))
    return header + name.encode().ljust(reserved, b"\0") + data


def _variant(name: str, value: Any) -> bytes:
    """Encode metadata as a CLX lite variant: type, name, value."""
    code = {int: 3, float: 6, str: 8, dict: 11}[type(value)]
    header = bytes([code, len(name) + 1]) + f"{name}\0".encode("utf-16-le")
    if code == 3:
        return header + struct.pack("<I", value)
    if code == 6:
        return header + struct.pack("<d", value)
    if code == 8:
        return header + f"{value}\0".encode("utf-16-le")
    body = b"".join(_variant(*item) for item in value.items())
    # A table of one offset per item follows the items.
    return (
        header
        + struct.pack("<IQ", len(value), len(header) + 12 + len(body))
        + body
        + bytes(8 * len(value))
    )
