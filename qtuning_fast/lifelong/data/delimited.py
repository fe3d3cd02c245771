"""The cells of CSV and TSV files as they are written: strings, with no guess at what they mean."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Literal, NamedTuple

Quoting = Literal[0, 3]  # csv.QUOTE_MINIMAL or csv.QUOTE_NONE

_LONGEST = 2**31 - 1  # characters of a cell; the module csv stops at 131,072 unless it is told otherwise


class Cells(NamedTuple):
    """What a file holds: the names of its columns, the cells of each row, and the line in which each row begins."""

    names: list[str]
    rows: list[list[str]]
    lines: list[int]


class QuoteError(ValueError):
    """Quotes that do not fit."""


def read_csv(text: str, file: str) -> Cells:
    """Cells between commas; a cell that begins with a double quote ends with one, and holds two for each of its own.

    Raises:
        QuoteError: a quote is never closed, or its cell goes on behind it.
        ValueError: the header or a row is not as it must be; the message says which, and what to do.
    """
    return _checked(_rows(text, ",", csv.QUOTE_MINIMAL, file), file, "put a text that holds commas into double quotes")


def read_tsv(text: str, file: str) -> Cells:
    """Cells between tabs, with quotes as in CSV where the whole file fits that rule; otherwise quotes are characters.

    Raises:
        ValueError: neither way is every row as long as the header, or both ways are, with different rows.
    """
    readings: list[Cells] = []
    errors: list[ValueError] = []
    quotings: list[Quoting] = [csv.QUOTE_NONE, csv.QUOTE_MINIMAL]
    for quoting in quotings if '"' in text else quotings[:1]:
        try:
            rows = _rows(text, "\t", quoting, file)
            readings.append(_checked(rows, file, "a text that holds tabs must stand in double quotes"))
        except ValueError as error:
            errors.append(error)
    if not readings:
        raise errors[0] if isinstance(errors[-1], QuoteError) else errors[-1]
    if len({len(reading.rows) for reading in readings}) > 1:
        plain_lines, quoted_lines = readings[0].lines, set(readings[1].lines)
        joined = next(row for row, line in enumerate(plain_lines) if line not in quoted_lines)
        raise ValueError(
            f"{file}: {row_location(max(joined - 1, 0), plain_lines)} can be read in two ways, for a quote in "
            "it opens a cell that may end there or in a later line; write the file as .csv or .jsonl"
        )
    return readings[-1]


def row_location(row: int, lines: Sequence[int] | None) -> str:
    """Which row that is, counted from 1, and which line of the file where that is another number."""
    line = row + 1 if lines is None else lines[row]
    return f"row {row + 1}" + (f" (line {line})" if line != row + 1 else "")


def _rows(text: str, delimiter: str, quoting: Quoting, file: str) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, the header among them, each with the line in which it begins."""
    lines = io.StringIO(text, newline="")  # line ends within quotes stay what they are
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
        return "has a cell that begins with a double quote, which is never closed; to begin a text with a quote " + _HOW
    return "has a cell that goes on behind its closing double quote; to write quotes within a text " + _HOW


_HOW = 'put the whole text into double quotes and double its own, as in """Great"" film"'


def _checked(numbered: list[tuple[int, list[str]]], file: str, advice: str) -> Cells:
    if not numbered:
        raise ValueError(f"{file} holds nothing but blank lines")
    names = [name.strip() for name in numbered[0][1]]
    if len(names) == 1:
        raise ValueError(
            f"{file}: the header has one column, {names[0]!r}, and a task needs two; cells are separated by commas in "
            "a .csv and by tabs in a .tsv"
        )
    lines, rows = [line for line, _ in numbered[1:]], [row for _, row in numbered[1:]]
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(
                f"{file}: the header has {len(names)} columns, but {row_location(number, lines)} has {len(row)} "
                f"cell{'s' * (len(row) != 1)}; "
                + (advice if len(row) > len(names) else "a row has a cell for each column, an empty one too")
            )
    return Cells(names, rows, lines)
