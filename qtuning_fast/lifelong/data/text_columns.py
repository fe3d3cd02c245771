"""Read the texts and labels of a table, and check them.

What labels are is never recognised from the values: a table is read for one problem type.
"""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

from qtuning_fast.lifelong.data.tables import DataWarning, Table, shortened

SEPARATOR = ";"  # between the labels of a cell, where a text may have several
_OTHER_SEPARATORS = ",|/"
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,99}")  # as Python and JSON write integers; 01 and 1.0 are names like any other
_KINDS = {str: "a string", bool: "a boolean", int: "an integer", float: "a number with a fraction"}
_SEVERAL = 'for several labels a text, set problem_type="multi_label_classification"'
_NUMBERS = 'for numbers to predict, set problem_type="regression"'


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
    _check_label_types(table, column, list(enumerate(values)))
    _check_unicode(table, column, values)
    written = [_written(value) for value in values]
    labels = [label.strip() for label in written]
    _warn_about_similar_labels(table, column, written)
    names = _in_order(labels)
    _warn_about_joined_labels(table, column, names, SEPARATOR + _OTHER_SEPARATORS, _SEVERAL)
    return labels, names


def read_label_sets(table: Table, column: str) -> tuple[list[tuple[str, ...]], list[str]]:
    """Read any number of labels of each row, and the names of all classes in order.

    A cell of CSV or TSV has its labels between semicolons, and none if it is empty. Elsewhere a value is a list of
    strings, integers or booleans, or of numbers that a `ClassLabel` names. Labels and their order are as in
    `read_labels`.

    Raises:
        ValueError: the column does not exist, or a value is no list, or a label is empty, has a wrong type or not that
            of the rest.
    """
    values = _values(table, column, option="label")
    if table.delimiter is not None:
        values = [[label.strip() for label in cell.split(SEPARATOR)] if cell.strip() else [] for cell in values]
    for row, value in enumerate(values):
        if not isinstance(value, (list, tuple)):
            said = "nothing" if value is None else _shown(value)
            raise ValueError(
                f'{_cell(table, column, row)} {said}, but it must be a list of labels, such as [] or ["a", "b"]'
            )
    if column in table.classes:
        names = table.classes[column]
        for row, value in enumerate(values):
            for label in value:
                if type(label) is not int or not 0 <= label < len(names):
                    raise ValueError(
                        f"{_cell(table, column, row)} {label!r:.40}, but it declares {len(names)} classes, "
                        "numbered from 0"
                    )
        return [tuple(names[label] for label in value) for value in values], names
    found = [(row, label) for row, value in enumerate(values) for label in value]
    for row, label in found:
        if label is None or (isinstance(label, str) and not label.strip()):
            raise ValueError(f"{_cell(table, column, row)} an empty label")
    _check_label_types(table, column, found)
    _check_unicode(table, column, [label for _, label in found])
    _warn_about_similar_labels(table, column, [_written(label) for _, label in found])
    sets = [tuple(_written(label).strip() for label in value) for value in values]
    names = _in_order([label for labels in sets for label in labels])
    how = f"separate the labels of a cell by {SEPARATOR!r}" if table.delimiter else "write them as a list"
    _warn_about_joined_labels(table, column, names, SEPARATOR + _OTHER_SEPARATORS, how)
    return sets, names


def read_numbers(table: Table, column: str) -> list[float]:
    """Read the number of each row. A cell of CSV or TSV is read as Python writes numbers, without white space around.

    Raises:
        ValueError: the column does not exist, or a value is missing, no number, or not finite.
    """
    values = _values(table, column, option="label")
    _check_not_empty(
        table, column, [value is None or (isinstance(value, str) and not value.strip()) for value in values]
    )
    numbers: list[float] = []
    for row, value in enumerate(values):
        number = _number(value, is_cell=table.delimiter is not None)
        if number is None:
            raise ValueError(f"{_cell(table, column, row)} {_shown(value)}, but regression needs finite numbers")
        numbers.append(number)
    return numbers


def _number(value: Any, *, is_cell: bool) -> float | None:
    """Return a value as a finite number, or None if it is none."""
    if isinstance(value, bool) or not isinstance(value, str if is_cell else (int, float)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _in_order(labels: Sequence[str]) -> list[str]:
    """Return the different labels: by number if all are integers, else by character."""
    return sorted(set(labels), key=int if all(map(_INTEGER.fullmatch, labels)) else None)


def is_unlabelled(table: Table, column: str) -> bool:
    """Whether all labels are the class -1, as in test splits on the hub whose labels are hidden."""
    return column in table.classes and set(table.column(column)) == {-1}


def check_known_labels(
    table: Table, labels: Sequence[str | Iterable[str] | float], known: Sequence[str], reason: str
) -> None:
    """Raise a `ValueError` if a label, or one of several, is not known; the reason follows the label in the message.

    Numbers need not be known.
    """
    names = set(known)
    every: Iterator[tuple[int, str]] = (
        (row, label)
        for row, given in enumerate(labels)
        if not isinstance(given, float)
        for label in ([given] if isinstance(given, str) else given)
    )
    for row, label in every:
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


def _check_label_types(table: Table, column: str, values: Sequence[tuple[int, Any]]) -> None:
    """Check labels, each with its row."""
    for row, value in values:
        if type(value) not in (str, int, bool):
            way_out = {list: f"; {_SEVERAL}", float: f"; {_NUMBERS}"}.get(type(value), "")
            raise ValueError(
                f"{_cell(table, column, row)} {_shown(value)}, but labels must be strings, integers, or true and false"
                + way_out
            )
        first, other = values[0]
        if type(value) is not type(other):
            raise ValueError(
                f"{_cell(table, column, row)} {_shown(value)}, but in {table.row_location(first)} {_shown(other)}; "
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


def _warn_about_joined_labels(table: Table, column: str, names: Sequence[str], separators: str, way_out: str) -> None:
    """Warn about labels that look like several in one: a part of one is a label itself, or a part of another one."""
    for separator in separators:
        parts = {name: [part.strip() for part in name.split(separator)] for name in names}
        counts = Counter(part for name in names for part in set(parts[name]))
        joined = [name for name in names if len(parts[name]) > 1 and any(counts[part] > 1 for part in parts[name])]
        if joined:
            warnings.warn(
                f"{table.where}: column {column!r} holds {joined[0]!r}, which looks like several labels but is one; "
                + way_out,
                DataWarning,
                stacklevel=4,
            )
            return
