"""Documentation pages: links have targets, commands parse, and the site contains every page."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from accepted import accept

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def commands_of(page):
    """The words of every `perturbjax` line of a page, without comments; continued lines are
    joined."""
    text = page.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        match = re.match(r"\s+(?:srun )?(perturbjax [a-z].*)", line)
        if match and "…" not in line:
            yield shlex.split(match[1], comments=True)


ALL = [(page, words) for page in PAGES for words in commands_of(page)]


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_have_targets(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=[f"{page.stem}-{at}" for at, (page, _) in enumerate(ALL)]
)
def test_commands_on_the_pages_parse(page, words):
    _, command, *rest = words
    accept(command, rest)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_commands_of_the_makefile_parse():
    printed = subprocess.run(
        ["make", "--dry-run", "demo", "demo-real"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = [shlex.split(line) for line in printed.splitlines() if "/perturbjax " in line]
    assert len(commands) == 4
    for _, command, *words in commands:
        accept(command, words)


def test_navigation_lists_every_page():
    contents = (REPOSITORY / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}" in contents, page


def test_navigation_and_home_page_name_the_tutorials():
    contents = (REPOSITORY / "mkdocs.yml").read_text()
    section = contents.split("- Tutorials:")[1].split("- How to:")[0]
    home = (DOCS / "index.md").read_text()
    for page in ("from_images_to_hits", "dose_response", "evaluating_profiles"):
        assert f"notebooks/{page}.md" in section and f"(notebooks/{page}.md)" in home
    assert "howto/gpu.md" in section and "(howto/gpu.md)" in home


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the diff")
def test_worked_change_applies_to_the_present_files(tmp_path):
    (diff,) = re.findall(
        r"```diff\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    files = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    assert len(files) == 2
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copy(REPOSITORY / file, tmp_path / file)
    done = subprocess.run(
        ["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    choices, tests = ((tmp_path / file).read_text() for file in files)
    assert '"mean": NormalizationChoice(' in choices and "def test_mean_divides" in tests
