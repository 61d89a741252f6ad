"""What the pages say is there: links lead somewhere, commands are commands, and the site has every page."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from accepted import accept

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def commands_of(page):
    """Commands that stand alone on their lines, continued lines joined, without their comments."""
    text = page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(r"\s+(?:srun )?(perturbjax [a-z].*)", line)
        if found and "…" not in line:
            yield shlex.split(found[1], comments=True)


ALL = [(page, words) for page in PAGES for words in commands_of(page)]


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_what_is_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=[f"{page.stem}-{at}" for at, (page, _) in enumerate(ALL)]
)
def test_commands_on_the_pages_parse(page, words):
    _, verb, *rest = words
    accept(verb, rest)


def test_every_page_is_in_the_contents():
    contents = (REPOSITORY / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}" in contents, page
