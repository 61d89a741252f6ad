"""Limits of the wording: plain technical English in documentation, messages and names of the
project.

The rate of idiomatic marker words per 1,000 words is limited separately for docstrings and
comments, for other strings (help, messages, pages), and for Markdown. Libraries such as optax, timm
and Cellpose have rates of 0 to 2.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("perturbjax", "data_prep", "experiments", "tests", "docs", "README.md")
#: Words that are frequent in idiomatic or indirect sentences.
MARKERS = set(
    [
        "what",
        "said",
        "says",
        "told",
        "tell",
        "tells",
        "stands",
        "stand",
        "beside",
        "alone",
        "goes",
        "asked",
        "asks",
        "known",
        "seen",
        "sees",
        "dealt",
        "deal",
        "judged",
        "judges",
        "held",
        "kept",
        "lies",
        "lie",
        "anew",
        "nothing",
        "others",
        "own",
        "itself",
        "whoever",
        "whose",
        "judging",
    ]
)
#: Kind of text -> maximum number of marker words, and of the word "what", in 1,000 words.
LIMITS = {"documentation": (5.0, 1.0), "strings": (3.0, 1.0), "markdown": (3.0, 1.0)}
#: Texts below this number of words are too short for a rate.
LEAST_WORDS = 200


def markdown_text(source: str) -> str:
    """The prose of a Markdown page, without code and tables."""
    source = re.sub(r"```.*?```", " ", source, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`|^\|.*$|^ {4}.*$", " ", source, flags=re.MULTILINE)


def python_texts(source: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of the docstrings, comments and other strings of a Python file."""
    tree = ast.parse(source)
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in documentation:
                yield "documentation", node.value
            elif " " in node.value:
                yield "strings", node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield "documentation", token.string.lstrip("#: ")


def texts_of(root: Path) -> Iterator[tuple[str, Path, str]]:
    """(kind, file, text) of everything below a folder; this file, which lists the markers, is left
    out."""
    for path in [root] if root.is_file() else sorted(root.rglob("*")):
        if path.suffix == ".md":
            yield "markdown", path, markdown_text(path.read_text())
        elif path.suffix == ".py" and path != Path(__file__):
            yield from ((kind, path, text) for kind, text in python_texts(path.read_text()))


def count_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z']+", text.lower()))


@pytest.mark.parametrize("folder", FOLDERS)
def test_wording_has_few_marker_words(folder):
    words: dict[str, Counter[str]] = {}
    markers: dict[str, Counter[str]] = {}
    for kind, path, text in texts_of(REPOSITORY / folder):
        counts = count_words(text)
        words.setdefault(kind, Counter()).update(counts)
        number = sum(count for word, count in counts.items() if word in MARKERS)
        markers.setdefault(kind, Counter())[str(path.relative_to(REPOSITORY))] += number
    for kind, counts in words.items():
        total, (most, most_what) = sum(counts.values()), LIMITS[kind]
        if total >= LEAST_WORDS:
            rate = 1000 * sum(markers[kind].values()) / total
            worst = markers[kind].most_common(5)
            assert rate <= most, f"{folder}, {kind}: {rate:.1f} in 1,000 words, most in {worst}"
            assert 1000 * counts["what"] / total <= most_what, f"{folder}, {kind}: 'what'"


def test_marker_words_are_found_in_each_kind_of_text():
    source = '"""What is said."""\nname = "told anew"  # seen\n'
    found = {kind: count_words(text).keys() & MARKERS for kind, text in python_texts(source)}
    assert found == {"documentation": {"seen"}, "strings": {"told", "anew"}}
    assert count_words(markdown_text("| what |\nsaid `told`\n```\nseen\n```\n")) == {"said": 1}
