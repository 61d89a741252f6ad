"""Options of `perturbjax fetch`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.gallery_listing import GALLERY
from data_prep.sources.connections import redacted, split_url
from perturbjax.core.options import python_only, require, require_output, require_sound


@dataclass(frozen=True)
class FetchConfig:
    """Download a plate of the public Cell Painting Gallery."""

    plate: str
    """Plate barcode, such as BR00116991."""
    out: Path
    """Folder for images/PLATE/ and load_data.csv. The same command resumes a download."""
    accession: str = "cpg0000"
    """Data set of the gallery: a number (cpg0000, cpg0016) or its full name."""
    source: str = ""
    """Imaging site, such as source_4; by default the source of the pilot, or broad."""
    batch: str = ""
    """Imaging batch; by default 2020_11_04_CPJUMP1 for cpg0000."""
    channels: str = ""
    """Channels to download, separated by commas; by default all."""
    wells: str = ""
    """Wells to download, separated by commas; by default all."""
    sites: int = 0
    """Sites to download for each well, lowest numbers first; 0: all."""
    illumination: bool = False
    """Download the illumination functions into illum/PLATE/ too, for build --illumination."""
    tables_only: bool = False
    """Download no images; build --images s3://cellpainting-gallery reads them."""
    downloads: int = python_only(8, env="PERTURBJAX_DOWNLOADS")
    """Number of simultaneous downloads."""
    base_url: str = python_only(GALLERY, env="PERTURBJAX_GALLERY_URL")
    """URL of the gallery, without the last slash."""
    jump_metadata_url: str = python_only("", env="PERTURBJAX_JUMP_METADATA_URL")
    """URL of JUMP's well and compound tables for cpg0016; empty: JUMP's repository."""

    def __post_init__(self) -> None:
        require_sound(self)
        require_output(self.out)
        require("sites", self.sites, self.sites >= 0, "0 (all) or more")
        for flag in ("base_url", "jump_metadata_url"):
            if url := getattr(self, flag):
                _require_server(flag.replace("_", "-"), url)
        require("downloads", self.downloads, self.downloads >= 1, "at least 1")

    @property
    def root(self) -> str:
        """Prefix of all keys of the source."""
        return f"{self.accession}/{self.source}"


def _require_server(flag: str, url: str) -> None:
    """Check the address of a mirror.

    Raises:
        InputError: It is not an HTTP URL of a server.
    """
    # Spaces and letters outside of ASCII are encoded as %XX in URLs.
    is_url = re.fullmatch(r"https?://[!-~]{1,2000}", url) and not re.search("[?#]", url)
    require(flag, redacted(url), bool(is_url), "a URL such as https://server/folder")
    split_url(url)
