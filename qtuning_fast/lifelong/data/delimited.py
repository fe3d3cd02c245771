"""Read the cells of CSV and TSV files as strings, exactly as written."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Literal, NamedTuple

Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL or csv.QUOTE_NONE

_LONGEST = 2**31 - 1  # characters of a cell; the default of the module csv is 131,072


class Cells(NamedTuple):
    """The content of a file: the names of its columns, the cells of each row, and the first line of each row."""

    names: list[str]
    rows: list[list[str]]
    lines: list[int]


class QuoteError(ValueError):
    """The quotes in a file do not match."""


def read_csv(text: str, file: str) -> Cells:
    """Read cells between commas. A cell that begins with a double quote ends with one and doubles those inside it.

    Raises:
        QuoteError: a quote is never closed, or text follows it in its cell.
        ValueError: the header or a row is malformed; the message says which, and what to do.
    """
    return _checked(_rows(text, ",", csv.QUOTE_MINIMAL, file), file, "put a text with commas in double quotes")


def read_tsv(text: str, file: str) -> Cells:
    """Read cells between tabs. Quotes work as in CSV if that fits the whole file; otherwise they are characters.

    Raises:
        ValueError: neither way gives rows as long as the header, or both do but their rows differ.
    """
    readings: list[Cells] = []
    errors: list[ValueError] = []
    quotings: list[Quoting] = [csv.QUOTE_NONE, csv.QUOTE_MINIMAL]
    for quoting in quotings if '"' in text else quotings[:1]:
        try:
            rows = _rows(text, "\t", quoting, file)
            readings.append(_checked(rows, file, "put a text with tabs in double quotes"))
        except ValueError as error:
            errors.append(error)
    if not readings:
        raise errors[0] if isinstance(errors[-1], QuoteError) else errors[-1]
    if len({len(reading.rows) for reading in readings}) > 1:
        plain_lines, quoted_lines = readings[0].lines, set(readings[1].lines)
        joined = next(row for row, line in enumerate(plain_lines) if line not in quoted_lines)
        raise ValueError(
            f"{file}: {row_location(max(joined - 1, 0), plain_lines)} can be read in two ways, because a "
            "quote opens a cell that may end there or in a later line; write the file as .csv or .jsonl"
        )
    return readings[-1]


def row_location(row: int, lines: Sequence[int] | None) -> str:
    """The number of a row, counted from 1, and its line in the file if that differs."""
    line = row + 1 if lines is None else lines[row]
    return f"row {row + 1}" + (f" (line {line})" if line != row + 1 else "")


def _rows(text: str, delimiter: str, quoting: Quoting, file: str) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, including the header, each with its first line."""
    lines = io.StringIO(text, newline="")  # keep line ends inside quotes
    limit = csv.field_size_limit(_LONGEST)
    try:
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        rows: list[tuple[int, list[str]]] = []
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                where = f"row {len(rows)} (line {line})" if rows else f"the header (line {line})"
                raise QuoteError(f"{file}: {where} {_quote_reason(str(error))}") from None
            if row is None:
                return rows
            if row:
                rows.append((line, row))
    finally:
        csv.field_size_limit(limit)


def _quote_reason(error: str) -> str:
    if "end of data" in error:
        return "has a cell that begins with a double quote and never closes it; to begin a text with a quote, " + _HOW
    return "has a cell with text after its closing double quote; to write quotes inside a text, " + _HOW


_HOW = 'put the whole text in double quotes and double its own quotes, as in """Great"" film"'


def _checked(numbered: list[tuple[int, list[str]]], file: str, advice: str) -> Cells:
    if not numbered:
        raise ValueError(f"{file} has only blank lines")
    names = [name.strip() for name in numbered[0][1]]
    if len(names) == 1:
        raise ValueError(
            f"{file}: the header has one column, {names[0]!r}, but a task needs two; separate cells by commas in "
            "a .csv and by tabs in a .tsv"
        )
    lines, rows = [line for line, _ in numbered[1:]], [row for _, row in numbered[1:]]
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"{file}: the header has {len(names)} columns, but {row_location(number, lines)} has {len(row)} "
                f"cell{'s' * (len(row) != 1)}; "
                + (advice if len(row) > len(names) else "each row needs a cell for each column, even an empty one")
            )
    return Cells(names, rows, lines)
