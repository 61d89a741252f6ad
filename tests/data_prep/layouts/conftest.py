"""Folders with the file names of microscopes; the images are empty files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Create files below a folder: names of images, and metadata files with their content."""

    def create(images: Iterable[str], metadata: dict[str, str] | None = None) -> Path:
        root = tmp_path / "images"
        contents = {**dict.fromkeys(images, ""), **(metadata or {})}
        for name, content in contents.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return root

    return create
