"""Read the texts and labels of a table, and check them."""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

from qtuning_fast.lifelong.data.tables import DataWarning, Table, shortened

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,99}")  # as Python and JSON write integers; 01 and 1.0 are names like any other
_KINDS = {str: "a string", bool: "a boolean", int: "an integer", float: "a number with a fraction"}


def read_texts(table: Table, column: str) -> list[str]:
    """Read the texts, exactly as written.

    Raises:
        ValueError: the column does not exist, or a value is empty or not a string.
    """
    values = _values(table, column, option="text")
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{_cell(table, column, row)} {_shown(value)}, but it must be a string")
    _check_not_empty(table, column, [value is None or not value.strip() for value in values])
    _check_unicode(table, column, values)
    return values


def read_labels(table: Table, column: str) -> tuple[list[str], list[str]]:
    """Read the label of each row, and the names of all classes in order.

    Strings lose the white space around them; integers become digits, and booleans become `true` and `false`. A
    `ClassLabel` declares the order. Otherwise it is by number if all labels are integers, and by character if not.

    Raises:
        ValueError: the column does not exist, or a value is missing, or has a wrong type or not that of the rest.
    """
    values = _values(table, column, option="label")
    if column in table.classes:
        names = table.classes[column]
        _check_not_empty(table, column, [value is None or (isinstance(value, int) and value < 0) for value in values])
        for row, value in enumerate(values):
            if type(value) is not int or value >= len(names):
                raise ValueError(
                    f"{_cell(table, column, row)} {value!r:.40}, but it declares {len(names)} classes, numbered from 0"
                )
        return [names[value] for value in values], names
    _check_not_empty(
        table, column, [value is None or (isinstance(value, str) and not value.strip()) for value in values]
    )
    _check_label_types(table, column, values)
    _check_unicode(table, column, values)
    written = [_written(value) for value in values]
    labels = [label.strip() for label in written]
    _warn_about_similar_labels(table, column, written)
    names = sorted(set(labels), key=int if all(map(_INTEGER.fullmatch, labels)) else None)
    return labels, names


def is_unlabelled(table: Table, column: str) -> bool:
    """Whether all labels are the class -1, as in test splits on the hub whose labels are hidden."""
    return column in table.classes and set(table.column(column)) == {-1}


def check_known_labels(table: Table, labels: Sequence[str], known: Sequence[str], reason: str) -> None:
    """Raise a `ValueError` if a label is not known; the reason follows the label in the message."""
    names = set(known)
    for row, label in enumerate(labels):
        if label not in names:
            similar = (name for name in known if _look(name) == _look(label))
            alike = next((f"; it looks like {name!a} but is {label!a}" for name in similar), "")
            raise ValueError(f"{table.where}: label {label!r} {reason}; it is in {table.row_location(row)}{alike}")


def warn_about_joined_rows(table: Table, label_names: Sequence[str]) -> None:
    """Warn about a cell with a line that looks like a row or its end: a stray quote may have joined rows."""
    if table.delimiter is None:
        return
    labels = set(label_names)
    for column in table.names:
        for row, cell in enumerate(table.column(column)):
            for line in cell.splitlines() if "\n" in cell or "\r" in cell else ():
                if _may_be_a_row(line.split(table.delimiter), labels, cell.count(table.delimiter), len(table.names)):
                    warnings.warn(
                        f"{table.where}: column {column!r} in {table.row_location(row)} holds a line that looks "
                        f"like a row of its own, {line[:60]!r}; if it is one, remove the stray double quote before it",
                        DataWarning,
                        stacklevel=3,
                    )
                    return


def _may_be_a_row(cells: Sequence[str], labels: Set[str], delimiters: int, columns: int) -> bool:
    """Whether a line has a label where a row may have one. A cell of joined rows has as many delimiters as a row."""
    if len(cells) >= columns and {cells[0].strip(), cells[-1].strip()} & labels:
        return True
    return len(cells) > 1 and delimiters >= columns - 1 and not labels.isdisjoint(cells)


def _values(table: Table, column: str, option: str) -> list[Any]:
    if column not in table.names:
        held = shortened([repr(name) for name in table.names]) or "empty objects"
        raise ValueError(
            f"{table.where}: there is no column {column!r}, only {held}; "
            f"name yours with --{option}-column (in Python {option}_column)"
            + (", or write the names in the first row" if table.delimiter else "")
        )
    if list(table.names).count(column) > 1:
        raise ValueError(
            f"{table.where}: several columns have the name {column!r}; rename all but one in the first row"
        )
    return table.column(column)


def _cell(table: Table, column: str, row: int) -> str:
    return f"{table.where}: column {column!r} in {table.row_location(row)} holds"


def _shown(value: Any) -> str:
    kind = _KINDS.get(type(value), f"of the kind {type(value).__name__}")
    return f"{value[:40]!r}, {kind}" if isinstance(value, str) else f"{_written(value)[:40]}, {kind}"


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_not_empty(table: Table, column: str, gaps: list[bool]) -> None:
    if any(gaps):
        raise ValueError(
            f"{table.where}: column {column!r} is empty in {sum(gaps)} of {len(gaps)} rows, "
            f"first in {table.row_location(gaps.index(True))}; fill in what is missing, or leave these rows out"
        )


def _check_label_types(table: Table, column: str, values: Sequence[Any]) -> None:
    for row, value in enumerate(values):
        if type(value) not in (str, int, bool):
            raise ValueError(
                f"{_cell(table, column, row)} {_shown(value)}, but labels must be strings, integers, or true and false"
            )
        if type(value) is not type(values[0]):
            raise ValueError(
                f"{_cell(table, column, row)} {_shown(value)}, but in {table.row_location(0)} {_shown(values[0])}; "
                "write all labels in one way"
            )


def _check_unicode(table: Table, column: str, values: Sequence[Any]) -> None:
    for row, value in enumerate(values):
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{_cell(table, column, row)} half a character (an unpaired surrogate), which is not text"
            ) from None


def _look(label: str) -> str:
    """The label as a reader sees it, without case, white space and characters of zero width."""
    visible = "".join(each for each in label if unicodedata.category(each) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible).casefold().split())


def _warn_about_similar_labels(table: Table, column: str, written: Sequence[str]) -> None:
    """Warn about labels that look the same to a reader."""
    alike: dict[str, Counter[str]] = {}
    for label in written:
        alike.setdefault(_look(label), Counter())[label] += 1
    for counts in alike.values():
        if len(counts) == 1:
            continue
        kept = {label.strip() for label in counts}
        said = ", ".join(f"{label!r} {count} times" for label, count in counts.items())
        as_what = f"are read as one, {kept.pop()!r}" if len(kept) == 1 else f"are {len(kept)} classes"
        warnings.warn(f"{table.where}: column {column!r} holds {said}: they {as_what}", DataWarning, stacklevel=4)
