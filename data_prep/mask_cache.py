"""Finished masks, each under the digest of the pixels it was made from and of the segmenter that made it.

Two datasets of the same images share their masks, a killed build finds its own again, and an image that changed has
another digest, and so no mask. Masks of the build at work lie in its working folder; a copy goes to the cache, which
is kept below a bound by dropping what was used longest ago. A cache that cannot be written is done without.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt, UInt16

from perturbjax.core.errors import InputError
from perturbjax.core.files import atomic, delete_oldest, user_cache
from perturbjax.core.messages import console

#: Part of every key: raised when what an engine is given, or what is kept of its mask, changes.
MASK_VERSION = 1
#: Bytes the cache may hold after a build; a mask of 1,080 x 1,080 pixels takes about 20 kB.
CACHE_BYTES = 4 << 30


def mask_key(image: UInt[np.ndarray, "h w c"], segmenter: dict[str, Any]) -> str:
    """SHA-256 of the pixels a segmenter is given and of its provenance (engine, version, weights, parameters)."""
    described = {
        "mask": MASK_VERSION,
        "segmenter": segmenter,
        "shape": image.shape,
        "dtype": image.dtype.str,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def default_cache() -> Path:
    """`perturbjax/masks` in the user's cache folder."""
    return user_cache("masks")


@dataclass(frozen=True)
class MaskStore:
    """Masks of one build by key, backed by the cache."""

    folder: Path
    """Of the build at work: nothing is dropped here."""
    cache: Path | None = None
    """Shared by all builds; None does without."""

    def find(self, key: str) -> bool:
        """Whether the mask is finished; one from the cache is taken into the build's own folder."""
        if self._own(key).is_file():
            if self._read(key) is not None:
                return True
            self._own(key).unlink()
        if self.cache is None:
            return False
        kept = self._cached(key)
        try:
            with atomic(self._own(key)) as temporary:
                shutil.copyfile(kept, temporary)
            os.utime(kept)  # used now: dropped last
        except (OSError, InputError):
            return False
        return self._read(key) is not None

    def keep(self, key: str, mask: UInt16[np.ndarray, "h w"]) -> None:
        """Keep a finished mask.

        Raises:
            InputError: the build's own folder cannot be written.
        """
        import tifffile

        with atomic(self._own(key)) as temporary:
            tifffile.imwrite(temporary, mask, compression="zlib", metadata=None)
        if self.cache is None:
            return
        try:
            with atomic(self._cached(key)) as temporary:
                shutil.copyfile(self._own(key), temporary)
        except (OSError, InputError):
            return  # read-only or full: the next build segments again

    def get(self, key: str) -> UInt16[np.ndarray, "h w"] | None:
        """The mask of a key; None where there is none."""
        return self._read(key)

    def _read(self, key: str) -> np.ndarray | None:
        import tifffile

        try:
            mask = tifffile.imread(self._own(key))
        except Exception:  # tifffile and its codecs raise many kinds
            return None
        return mask if mask.dtype == np.uint16 and mask.ndim == 2 else None

    def _own(self, key: str) -> Path:
        return self.folder / f"{key}.tiff"

    def _cached(self, key: str) -> Path:
        assert self.cache is not None
        return self.cache / key[:2] / f"{key}.tiff"


def trim(cache: Path, most: int = CACHE_BYTES) -> None:
    """Drop the masks used longest ago until the cache holds at most that many bytes."""
    dropped = delete_oldest(
        cache.glob("??/*.tiff"), most
    )  # what a kill left half-written among them
    if dropped:
        console.print(f"note: the {dropped} masks used longest ago were dropped from {cache}")
