"""One imaging site as the workers receive it: its image planes and illumination functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.sources import Plane


@dataclass(frozen=True)
class Site:
    """The image planes of one site."""

    name: str
    """`site_id`."""
    where: str
    """Table and row of the site, for messages."""
    stored: tuple[Plane, ...]
    """Channels of the stored image."""
    segmented: tuple[Plane, ...]
    """Channels that are segmented; empty: the stored image is segmented."""
    cells: tuple[Plane, ...] = ()
    """Channel in which nuclei are extended to whole cells; empty: the masks are final."""
    channels: tuple[str, ...] = ()
    """Channel names of `stored`, `segmented` and `cells`."""
    functions: tuple[Path, ...] = ()
    """Illumination function of each entry of `channels`; empty: no illumination correction."""
    plate: str = ""
    diameter: float = 0.0
    """Typical diameter in pixels of the objects of the plate; 0 uses that of the segmenter."""

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Distinct planes of the site."""
        # A channel can be stored and segmented; it is read once.
        return tuple(dict.fromkeys(self._all_planes))

    @property
    def function_of(self) -> dict[Plane, Path]:
        """Illumination function of each plane; empty without illumination correction."""
        return dict(zip(self._all_planes, self.functions, strict=False))

    def plane_of(self, channel: str) -> Plane:
        """Return the plane of a channel."""
        return self._all_planes[self.channels.index(channel)]

    def single_channel(self, channel: str) -> Site:
        """Return this site with one channel and without illumination correction."""
        plane = self.plane_of(channel)
        return replace(
            self, stored=(plane,), segmented=(), cells=(), channels=(channel,), functions=()
        )

    @property
    def _all_planes(self) -> tuple[Plane, ...]:
        return (*self.stored, *self.segmented, *self.cells)


def set_functions(sites: list[Site], functions: Mapping[tuple[str, str], Path]) -> list[Site]:
    """Set the illumination functions of sites.

    Args:
        sites: Sites of one or more plates.
        functions: (plate, channel) → file of the illumination function; empty leaves the sites
        unchanged.
    """
    if not functions:
        return sites
    return [
        replace(site, functions=tuple(functions[site.plate, name] for name in site.channels))
        for site in sites
    ]
