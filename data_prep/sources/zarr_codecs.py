"""Decoders of Zarr chunks with limits: a chunk decodes to at most its expected size.

A few kilobytes can expand to gigabytes, so the size of a chunk limits the output of each decoder
before it starts. zarr-python reads missing chunks as zeros; here they are an error, because an
incomplete store has missing chunks too.
"""

from __future__ import annotations

import asyncio
import bz2
import gzip
import io
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs.registry import get_codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec
from zarr.codecs._v2 import V2Codec
from zarr.core.codec_pipeline import BatchedCodecPipeline

from data_prep.sources import jpeg2000
from perturbjax.dataset import LARGEST_SITE

#: Codecs of imagecodecs for bytes and for images. All accept an output array, whose size they do
#: not exceed.
_BYTES = (
    "blosc|blosc2|brotli|bz2|deflate|lz4|lz4f|lz4h5|lzf|lzfse|lzma|lzw|packbits|snappy|zlib|zlibng|"
    "zopfli|zstd"
)
_IMAGES = "jpeg|jpeg2k|jpegls|jpegxl|jpegxr|png|spng"
#: Filters and checksums, whose output has at most eight times the size of their input.
_FILTERS = (
    "imagecodecs_(delta|xor|bitorder|bitshuffle|byteshuffle|checksum)|(numcodecs[.])?(delta|shuffle|"
    "packbits|bitround|fixedscaleoffset|crc32c?|adler32|fletcher32)|bytes|transpose"
)
#: Names of permitted codecs. Others, such as pickle, could run code of an untrusted store, or have
#: no limit.
_PERMITTED = re.compile(
    f"imagecodecs_({_BYTES}|{_IMAGES})|(numcodecs[.])?(blosc|zstd|zlib|gzip|lz4|bz2|lzma)|"
    f"{_FILTERS}|sharding_indexed"
)
#: Bytes in addition to the pixels, for checksums.
_EXTRA = 1024
#: Bytes of a pixel between two filters.
_WIDEST = 8


class MissingChunk(Exception):
    """A requested chunk does not exist."""


def bounded(array: Any) -> Any:
    """Change an array of zarr-python in place: it decodes with limits, and refuses missing chunks.

    Args:
        array: Array opened with zarr-python.

    Returns:
        The array.
    """
    opened = array._async_array
    # The class is frozen, but zarr-python sets this attribute in the same way.
    object.__setattr__(opened, "codec_pipeline", _Pipeline.from_codecs(opened.codec_pipeline))
    return array


def forbidden_codec(metadata: Any) -> str | None:
    """Return the first codec in the metadata of an array that is not permitted."""
    return next((name for name in _codecs(metadata) if not _PERMITTED.fullmatch(name)), None)


def _codecs(metadata: Any) -> Iterator[str]:
    """Yield the names of the codecs of an array, including those inside a shard."""
    if metadata.zarr_format == 2:
        yield from (
            codec.codec_id
            for codec in (metadata.compressor, *(metadata.filters or ()))
            if codec is not None
        )
        return
    pending = list(metadata.to_dict()["codecs"])
    while pending:
        codec = pending.pop()
        yield codec["name"]
        # A shard has codecs for its chunks and for its index.
        inner = codec.get("configuration", {})
        pending += [*inner.get("codecs", ()), *inner.get("index_codecs", ())]


@dataclass(frozen=True)
class _Pipeline(BatchedCodecPipeline):
    """Codecs of an array, each with a limit."""

    @classmethod
    def from_codecs(cls, codecs: Iterable[Any], *, batch_size: int | None = None) -> Any:
        return super().from_codecs(tuple(map(_with_limit, codecs)), batch_size=batch_size)

    async def read_batch(self, batch_info: Iterable[Any], *args: Any, **options: Any) -> Any:
        required = [(_Required(getter), *more) for getter, *more in batch_info]
        return await super().read_batch(required, *args, **options)


@dataclass(frozen=True)
class _Required:
    """Source of the bytes of a chunk that must exist."""

    getter: Any

    async def get(self, *args: Any, **options: Any) -> Any:
        value = await self.getter.get(*args, **options)
        if value is None:
            # A chunk in a shard has coordinates; a chunk in a file has a path.
            name = getattr(self.getter, "chunk_coords", None) or self.getter.path
            raise MissingChunk(f"chunk {name} is missing")
        return value


def _with_limit(codec: Any) -> Any:
    if isinstance(codec, V2Codec):
        return _LimitedV2(codec.filters, codec.compressor)
    if isinstance(codec, ShardingCodec):
        options = ("chunk_shape", "codecs", "index_codecs", "index_location")
        return _CompleteShards(**{name: getattr(codec, name) for name in options})
    if isinstance(codec, BytesBytesCodec) and not isinstance(codec, _Limited):
        return _Limited(codec)
    return codec


@dataclass(frozen=True)
class _LimitedV2(V2Codec):
    """Compressor and filters of a Zarr v2 array."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        dtype = chunk_spec.dtype.to_native_dtype()
        width = _WIDEST if self.filters else dtype.itemsize

        def limited(codec: Any) -> Any:
            return codec and _LimitedCodec(codec, chunk_spec.shape, dtype, width)

        filters = tuple(map(limited, self.filters or ()))
        codec = V2Codec(filters or None, limited(self.compressor))
        return await codec._decode_single(chunk_bytes, chunk_spec)


class _CompleteShards(ShardingCodec):
    """Shards of a Zarr v3 array. A shard is written at once, so that it has all of its chunks."""

    @property
    def codec_pipeline(self) -> Any:
        return _Pipeline.from_codecs(self.codecs)

    async def _decode_single(self, shard_bytes: Any, shard_spec: Any) -> Any:
        # Called for compressed shards only, which are decoded as a whole.
        if math.prod(shard_spec.shape) > LARGEST_SITE:
            raise ValueError(f"a shard has shape {shard_spec.shape}")
        return await super()._decode_single(shard_bytes, shard_spec)

    async def _decode_shard_index(self, *args: Any) -> Any:
        # zarr-python would fill the whole shard with zeros.
        index = await super()._decode_shard_index(*args)
        if index.is_all_empty():
            raise MissingChunk("a shard without chunks")
        return index


@dataclass(frozen=True)
class _Limited(BytesBytesCodec):
    """Compressor or checksum of a Zarr v3 array."""

    codec: Any
    is_fixed_size = False

    def to_dict(self) -> dict[str, Any]:
        return self.codec.to_dict()

    def compute_encoded_size(self, size: int, chunk_spec: Any) -> int:
        return self.codec.compute_encoded_size(size, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        described = self.to_dict()
        name = described["name"].removeprefix("numcodecs.")
        if name == "crc32c":
            return await self.codec._decode_single(chunk_bytes, chunk_spec)
        # Codecs of zarr-python have settings for encoding only.
        is_numcodec = described["name"] != name
        settings = described.get("configuration", {}) if is_numcodec else {}
        dtype = chunk_spec.dtype.to_native_dtype()
        codec = _LimitedCodec(
            get_codec({"id": name, **settings}), chunk_spec.shape, dtype, dtype.itemsize
        )
        decoded = await asyncio.to_thread(codec.decode, chunk_bytes.as_array_like())
        return chunk_spec.prototype.buffer.from_bytes(memoryview(decoded))


@dataclass(frozen=True)
class _LimitedCodec:
    """A codec of numcodecs with a limit."""

    codec: Any
    shape: tuple[int, ...]
    """Shape of the chunk."""
    dtype: np.dtype
    """Data type of the chunk."""
    width: int
    """Maximum number of bytes per pixel of the output."""

    def decode(self, chunk: Any) -> Any:
        """Decode a chunk.

        Raises:
            ValueError: The result has more bytes, or another shape, than the chunk.
        """
        data = np.ascontiguousarray(chunk).tobytes()
        name = self.codec.codec_id
        limit = math.prod(self.shape) * self.width + _EXTRA
        kind = name.removeprefix("imagecodecs_")
        if kind != name and re.fullmatch(_IMAGES, kind):
            return self._decode_image(data, kind)
        if kind != name and re.fullmatch(_BYTES, kind):
            decoded = self.codec.decode(data, out=np.empty(limit + 1, np.uint8))
        elif name in _DECODERS:
            decoded = _DECODERS[name](self.codec, data, limit)
        else:
            # A filter or a checksum.
            if len(data) > limit:
                raise ValueError(f"a chunk has more than the expected {limit} bytes")
            return self.codec.decode(chunk)
        if len(decoded) > limit:
            raise ValueError(f"a chunk decodes to more than the expected {limit} bytes")
        return decoded

    def _decode_image(self, data: bytes, kind: str) -> Any:
        if kind == "jpeg2k":
            # OpenJPEG decodes first; the other decoders compare the shapes first.
            size = jpeg2000.read_size(data)
            if size.height * size.width * size.samples > math.prod(self.shape):
                raise ValueError(
                    f"a chunk of shape {self.shape} declares {size.height} x {size.width} pixels"
                )
            jpeg2000.require_complete(data, size)
        return self.codec.decode(data, out=np.empty(self.shape, self.dtype))


def _read_stream(codec: Any, data: bytes, limit: int) -> bytes:
    """Decompress gzip, bzip2 or LZMA up to one byte more than the limit."""
    stream = io.BytesIO(data)
    if codec.codec_id == "lzma":
        with lzma.LZMAFile(stream, format=codec.format, filters=codec.filters) as file:
            return file.read(limit + 1)
    with gzip.GzipFile(fileobj=stream) if codec.codec_id == "gzip" else bz2.BZ2File(stream) as file:
        return file.read(limit + 1)


def _read_zlib(codec: Any, data: bytes, limit: int) -> bytes:
    decompressor = zlib.decompressobj()
    decoded = decompressor.decompress(data, limit + 1)
    if len(decoded) <= limit and not decompressor.eof:
        raise ValueError("a chunk is truncated")
    return decoded


def _read_zstd(codec: Any, data: bytes, limit: int) -> Any:
    import imagecodecs

    # Raises if the output has more bytes.
    return imagecodecs.zstd_decode(data, out=limit + 1)


def _read_sized(codec: Any, data: bytes, limit: int) -> Any:
    """Decompress Blosc and LZ4 of numcodecs, which declare the size in the header."""
    start = 4 if codec.codec_id == "blosc" else 0
    size = int.from_bytes(data[start : start + 4], "little")
    if size > limit:
        raise ValueError(f"a chunk declares {size} bytes, but {limit} are expected")
    return codec.decode(data)


_DECODERS: dict[str, Callable[[Any, bytes, int], Any]] = {
    "gzip": _read_stream,
    "bz2": _read_stream,
    "lzma": _read_stream,
    "zlib": _read_zlib,
    "zstd": _read_zstd,
    "blosc": _read_sized,
    "lz4": _read_sized,
}
