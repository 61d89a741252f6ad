"""Cache of masks, each under the checksum of the pixels and of the segmenter it was computed with.

Datasets of the same images share masks, and an interrupted build reuses its masks. A changed image
has another checksum and therefore no mask. Masks of the running build are in its working folder,
with a copy in the cache. The masks that were not used for the longest time are dropped above a size
limit. A build continues without a cache that cannot be written."""

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

#: Part of every key: increased when the input of an engine or the stored form of its mask changes.
MASK_VERSION = 2
#: Maximum size of the cache after a build in bytes; a mask of 1080 x 1080 pixels takes about 20 kB.
CACHE_BYTES = 4 << 30


def mask_key(
    image: UInt[np.ndarray, "h w c"], segmenter: dict[str, Any], diameter: float = 0.0
) -> str:
    """Return the SHA-256 of everything a mask depends on.

    Args:
        image: pixels that are segmented.
        segmenter: provenance of the engine: version, weights, parameters.
        diameter: of the plate in pixels; 0 for the default of the engine.
    """
    settings = {
        "mask": MASK_VERSION,
        "segmenter": segmenter,
        "diameter": diameter,
        "shape": image.shape,
        "dtype": image.dtype.str,
    }
    # The settings include shape and type, because other images can have the same bytes.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def default_cache() -> Path:
    """Return `perturbjax/masks` in the user's cache folder."""
    return user_cache("masks")


@dataclass(frozen=True)
class MaskStore:
    """Masks of one build by key, backed by the cache."""

    folder: Path
    """Folder of the running build; its masks are never dropped."""
    cache: Path | None = None
    """Folder shared by all builds; None uses no cache."""

    def find(self, key: str) -> bool:
        """Return whether the mask exists, and copy it from the cache into the build's folder if
        needed."""
        if self._path(key).is_file():
            # A damaged file is deleted and segmented again.
            if self.get(key) is not None:
                return True
            self._path(key).unlink()
        if self.cache is None:
            return False
        cached = self._cache_path(key)
        try:
            with atomic(self._path(key)) as temporary:
                shutil.copyfile(cached, temporary)
            os.utime(cached)  # used now, so dropped last
        except (OSError, InputError):
            return False
        return self.get(key) is not None

    def put(self, key: str, mask: UInt16[np.ndarray, "h w"]) -> None:
        """Store a mask.

        Raises:
            InputError: the build's folder cannot be written.
        """
        import tifffile

        with atomic(self._path(key)) as temporary:
            # Four times as fast as zlib, and smaller.
            tifffile.imwrite(temporary, mask, compression="zstd", metadata=None)
        if self.cache is None:
            return
        try:
            # The copy in the cache is optional; the mask of this build is already stored.
            with atomic(self._cache_path(key)) as temporary:
                shutil.copyfile(self._path(key), temporary)
        except (OSError, InputError):
            return  # read-only or full: the next build segments again

    def put_failure(self, key: str, reason: str) -> None:
        """Record that a site could not be segmented; the next build tries again.

        Raises:
            InputError: the build's folder cannot be written.
        """
        with atomic(self._failure_path(key)) as temporary:
            Path(temporary).write_text(reason, encoding="utf-8")

    def failed(self, key: str) -> bool:
        """Return whether a failure is recorded in this build."""
        return self._failure_path(key).is_file()

    def get(self, key: str) -> UInt16[np.ndarray, "h w"] | None:
        """Return the mask of a key, None if there is none."""
        import tifffile

        try:
            mask = tifffile.imread(self._path(key))
        except Exception:  # tifffile and its codecs raise many kinds
            return None
        return mask if mask.dtype == np.uint16 and mask.ndim == 2 else None

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.tiff"

    def _failure_path(self, key: str) -> Path:
        return self.folder / f"{key}.failed"

    def _cache_path(self, key: str) -> Path:
        assert self.cache is not None
        # 256 subfolders by the first two digits, because large folders are slow.
        return self.cache / key[:2] / f"{key}.tiff"


def trim(cache: Path, most: int = CACHE_BYTES) -> None:
    """Drop the masks used longest ago until the cache holds at most that many bytes."""
    # Incomplete files of killed builds are dropped in the same way.
    dropped = delete_oldest(cache.glob("??/*.tiff"), most)
    if dropped:
        console.print(f"info: removed {dropped} least recently used masks from {cache}")
