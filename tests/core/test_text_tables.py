"""Rules for text in tables: missing values, spaces, whole numbers, separators."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from perturbjax.core.text_tables import case_variants, clean_columns, clean_text, detect_dialect


@pytest.mark.parametrize("cell", ["", " ", "NA", "na", "N/A", "nan", "NaN", "None", "null", "NULL"])
def test_clean_text_reads_spellings_of_missing_values_as_empty(cell: str) -> None:
    assert clean_text(pd.Series(["a", cell]))[0].tolist() == ["a", ""]


def test_clean_text_reads_missing_objects_as_empty() -> None:
    assert clean_text(pd.Series(["a", None, np.nan, pd.NA]))[0].tolist() == ["a", "", "", ""]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["0012", "12"], ["0012", "12"]),
        (["1", "1.0"], ["1", "1.0"]),
        (["1.0", "2.0", ""], ["1", "2", ""]),
        ([1.0, 2.0, np.nan], ["1", "2", ""]),
        ([1.0, 2.5], ["1.0", "2.5"]),
        ([1, 2], ["1", "2"]),
        ([True, False], ["True", "False"]),
        (["1e5", "inf", "TRUE"], ["1e5", "inf", "TRUE"]),
    ],
)
def test_clean_text_keeps_the_spelling_of_numbers(values: list, text: list[str]) -> None:
    assert clean_text(pd.Series(values))[0].tolist() == text


def test_clean_columns_reports_removed_spaces() -> None:
    table, notes = clean_columns(pd.DataFrame({"a": ["x ", "x", " "], "b": ["y", "y", "y"]}))
    assert table["a"].tolist() == ["x", "x", ""]
    assert notes == ["removed spaces at the ends of 1 cells of a"]


@pytest.mark.parametrize(
    ("header", "row", "dialect"),
    [
        ("a,b;c,d", "1,2,3", (",", ".")),
        ("a;b", "x;1,5", (";", ",")),
        ("a;b", "x;1.5", (";", ".")),
        ("a\tb", "1\t2", ("\t", ".")),
        ('"a;b;c",d', "", (",", ".")),
        ("a", "", (",", ".")),
        ("name," * 100_000, "", (",", ".")),
    ],
)
def test_detect_dialect_finds_separator_and_decimal_sign(header, row, dialect) -> None:
    assert detect_dialect(header, row) == dialect


def test_case_variants_groups_labels() -> None:
    assert case_variants(["dmso", "DMSO", "taxol", "DMSO"]) == [["DMSO", "dmso"]]
