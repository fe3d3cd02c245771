"""Cells between commas and tabs: which quotes are quotes, and rows that are not as long as the header."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtuning_fast.lifelong.data.delimited import read_csv, read_tsv
from qtuning_fast.lifelong.data.tables import read_table
from qtuning_fast.lifelong.data.text_columns import read_labels, read_texts

CSV = b"text,label\na film,good\na play,bad\n"
TSV = CSV.replace(b",", b"\t")


def rows_of(file: Path) -> list[tuple[str, str]]:
    table = read_table(file)
    return list(zip(read_texts(table, "text"), read_labels(table, "label")[0]))


READ: dict[str, tuple[str, bytes, list[tuple[str, str]]]] = {
    "quoted commas": ("a.csv", b'text,label\n"one, two",good\n', [("one, two", "good")]),
    "doubled quotes": ("a.csv", b'text,label\n"""Great"" film",good\n', [('"Great" film', "good")]),
    "lines in quotes": ("a.csv", b'text,label\n"one\r\n\r\ntwo\nthree",good\n', [("one\r\n\r\ntwo\nthree", "good")]),
    "a quote within": ("a.csv", b'text,label\na 7" disc,good\nit"s,bad\n', [('a 7" disc', "good"), ('it"s', "bad")]),
    "a quote after a space": ("a.csv", b'text,label\n "Great" film,good\n', [(' "Great" film', "good")]),
    "apostrophes": ("a.csv", b"text,label\n'Great' film,good\n", [("'Great' film", "good")]),
    "backslashes": ("a.csv", b"text,label\na\\n\\,good\n", [("a\\n\\", "good")]),
    "a TSV that begins with a quote": ("a.tsv", b'text\tlabel\n"Great" film\tgood\n', [('"Great" film', "good")]),
    "a TSV with an open quote": (
        "a.tsv",
        b'text\tlabel\n"Great film\tgood\nx\tbad',
        [('"Great film', "good"), ("x", "bad")],
    ),
    "a TSV with a quoted tab": ("a.tsv", b'text\tlabel\n"one\ttwo"\tgood\n', [("one\ttwo", "good")]),
    "a TSV with quoted lines": ("a.tsv", b'text\tlabel\n"one\ntwo"\tgood\n', [("one\ntwo", "good")]),
    "a TSV quoted throughout": ("a.tsv", b'"text"\t"label"\n"a ""b"""\t"good"\n', [('a "b"', "good")]),
    "a TSV with commas": ("a.tsv", b"text\tlabel\none, two\tgood\n", [("one, two", "good")]),
    "a very long cell": ("a.csv", b"text,label\n" + b"long " * 60_000 + b",good\n", [("long " * 60_000, "good")]),
}


@pytest.mark.parametrize("case", READ)
def test_it_is_read_to_the_letter(case: str, tmp_path: Path) -> None:
    name, content, expected = READ[case]
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == expected


REFUSED: dict[str, tuple[str, bytes, str]] = {
    # Rows and cells
    "an unquoted comma": (
        "a.csv",
        b"text,label\nnot bad, really,good\n",
        "the header has 2 columns, but row 1 (line 2) has 3 cells; put a text with commas in double quotes",
    ),
    "an unquoted comma later": (
        "a.csv",
        b"text,label\nx,y\n\none, two,good\n",
        "the header has 2 columns, but row 2 (line 4) has 3 cells",
    ),
    "a cell too few": (
        "a.csv",
        b"text,label\nx,good\ny\n",
        "but row 2 (line 3) has 1 cell; each row needs a cell for each column, even an empty one",
    ),
    "a comma at the end of rows": ("a.csv", b"text,label\nx,good,\n", "row 1 (line 2) has 3 cells"),
    "a tab within": (
        "a.tsv",
        b"text\tlabel\none\ttwo\tgood\n",
        "the header has 2 columns, but row 1 (line 2) has 3 cells; put a text with tabs",
    ),
    "rows of nothing": (
        "a.csv",
        b"text,label\nx,good\n,\n,\n",
        "column 'text' is empty in 2 of 3 rows, first in row 2 (line 3); fill in what is missing, or leave these rows",
    ),
    "an empty text": (
        "a.csv",
        b"text,label\nx,y\n  ,y\n",
        "column 'text' is empty in 1 of 2 rows, first in row 2 (line 3)",
    ),
    "an empty label": (
        "a.csv",
        b"text,label\nx,y\nx,  \n",
        "column 'label' is empty in 1 of 2 rows, first in row 2 (line 3)",
    ),
    # Quotes
    "a text behind a quote": (
        "a.csv",
        b'text,label\nx,bad\n"Great" film,good\n',
        "row 2 (line 3) has a cell with text after its closing double quote; to write quotes inside a text, put",
    ),
    "a quote never closed": (
        "a.csv",
        b'text,label\nx,bad\n"Great film,good\ny,bad\n',
        "row 2 (line 3) has a cell that begins with a double quote and never closes it",
    ),
    "a quote closed by another's": (
        "a.csv",
        b'text,label\n"Great film,good\n"a, b",bad\n',
        "row 1 (line 2) has a cell with text after",
    ),
    "escapes by backslashes": (
        "a.csv",
        b'text,label\n"he said \\"no\\" twice",good',
        "row 1 (line 2) has a cell with text after",
    ),
    "a quoted name never closed": (
        "a.csv",
        b'"text,label\nx,good\n',
        "the header (line 1) has a cell that begins with",
    ),
    "a TSV in two ways": (
        "a.tsv",
        b'text\tlabel\n"Great film\tgood\nawful"\tbad\n',
        "row 1 (line 2) can be read in two ways",
    ),
    "a TSV with a bad row and quotes": (
        "a.tsv",
        b'text\tlabel\n"Great" film\tgood\nx\ty\tz\n',
        "the header has 2 columns, but row 2 (line 3) has 3 cells",
    ),
    "a TSV quoted with a bad row": (
        "a.tsv",
        b'text\tlabel\n"one\ntwo"\tgood\nx\ty\tz\n',
        "the header has 2 columns, but row 2 (line 4) has 3 cells",
    ),
    # Headers
    "semicolons": (
        "a.csv",
        b"text;label\nx;good\n",
        "the header has one column, 'text;label', but a task needs two; separate cells by commas in a .csv",
    ),
    "tabs in a CSV": ("a.csv", TSV, r"the header has one column, 'text\tlabel'"),
    "commas in a TSV": ("a.tsv", CSV, "the header has one column, 'text,label'"),
    "no header": (
        "a.csv",
        b"I loved it,good\nI did not,bad\n",
        "only 'I loved it', 'good'; name yours with --text-column (in Python text_column), or write the names in",
    ),
    "another name": (
        "a.csv",
        b"text,Label\nx,good\n",
        "there is no column 'label', only 'text', 'Label'; name yours with --label-column",
    ),
    "a name twice": (
        "a.csv",
        b"text,label,text\nx,good,y\n",
        "has several columns with the name 'text'; rename all but one",
    ),
    "a name twice but for space": (
        "a.csv",
        b"text,label, label\nx,good,y\n",
        "has several columns with the name 'label'",
    ),
    "a header alone": ("a.csv", b"text,label\n", "has no rows"),
    "blank lines alone": ("a.tsv", b"\r\n\r\n", "has only blank lines"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name_row_and_reason(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


# Written by others and read again

AWKWARD = [
    '"Great" film',
    "one, two",
    "three\tfour",
    "five\nsix",
    'a 7" disc',
    "007",
    "NA",
    "true",
    " x ",
    '"',
    "\\",
    "'",
    ",",
]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".csv.gz", ".tsv.xz", ".parquet"])
def test_what_pandas_writes_is_read_as_it_was(ending: str, tmp_path: Path) -> None:
    expected = [(text, ("01", "1")[i % 2]) for i, text in enumerate(AWKWARD)]
    frame, file = pandas.DataFrame(expected, columns=["text", "label"]), tmp_path / f"a{ending}"
    writers: dict[str, Callable[[], Any]] = {
        ".csv": lambda: frame.to_csv(file, index=False),
        ".tsv": lambda: frame.to_csv(file, index=False, sep="\t"),
        ".json": lambda: frame.to_json(file, orient="records"),
        ".jsonl": lambda: frame.to_json(file, orient="records", lines=True),
        ".parquet": lambda: frame.to_parquet(file),
    }
    writers["." + ending.split(".")[1]]()
    assert rows_of(file) == expected


@pytest.mark.parametrize("text", [text for text in AWKWARD if "\n" not in text and "\t" not in text])
def test_a_tsv_of_lines_that_were_joined_by_tabs(text: str, tmp_path: Path) -> None:
    """One text that is no quoted cell makes all quotes characters."""
    (tmp_path / "a.tsv").write_text(f'text\tlabel\n{text}\tgood\n"Great" film\tbad\n')
    assert rows_of(tmp_path / "a.tsv") == [(text, "good"), ('"Great" film', "bad")]


TEXTS = st.text(st.sampled_from("ab \t\r\n\",;'\\é\u2028"), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_what_the_module_csv_writes_is_read_as_it_was(rows: list[tuple[str, str]]) -> None:
    for delimiter, read in ((",", read_csv), ("\t", read_tsv)):
        written = io.StringIO(newline="")
        csv.writer(written, delimiter=delimiter).writerows([("text", "label"), *rows])
        try:
            assert read(written.getvalue(), "a").rows == [list(row) for row in rows]
        except ValueError as error:
            assert delimiter == "\t" and "can be read in two ways" in str(error)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
def test_a_tsv_that_was_joined_by_tabs_is_read_as_it_was_or_refused(rows: list[tuple[str, str]]) -> None:
    """But for cells that are quoted as a whole: these quotes are taken off, by the rule."""
    cells = [re.sub(r"[\t\r\n]", " ", cell) for row in rows for cell in row]
    text = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in zip(cells[::2], cells[1::2]))
    try:
        read = [cell for row in read_tsv(text, "a").rows for cell in row]
    except ValueError as error:
        assert "can be read in two ways" in str(error)
        return
    if not any(re.fullmatch('"(?:[^"]|"")*"', cell) for cell in cells):
        assert read == cells
