"""Read files of labelled texts exactly as written; what is ambiguous is refused.

Nothing is cached and no type is inferred; docs/data.md states the rules.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from qtuning_fast.lifelong.data.delimited import Cells, read_csv, read_tsv, row_location

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}  # further endings, and the modules that unpack them
_READABLE = tuple(ending + packed for ending in ENDINGS for packed in ("", *_PACKED))

# The first bytes of a text file, which tell its encoding. UTF-32 comes first: its mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
_OTHER_FORMATS = {
    b"\x1f\x8b": "is packed with gzip; add .gz to its name",
    b"BZh91AY&SY": "is packed with bzip2; add .bz2 to its name",
    b"\xfd7zXZ": "is packed with xz; add .xz to its name",
    b"PK\x03\x04": "is a ZIP archive or an Excel file; unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "is an old Excel file; save it as CSV",
    b"PAR1": "is a Parquet file; name it .parquet",
}


class DataWarning(UserWarning):
    """The data is readable, but something in it looks like a mistake."""


@dataclass(frozen=True)
class Table:
    """Rows of labelled texts.

    Args:
        where: the name of the table in messages.
        size: the number of rows.
        names: the names of the columns.
        column: returns the values of a column as the source has them, None for a missing value.
        classes: the class names of columns that hold class numbers, or lists of them.
        lines: the first line of each row; None if the source has no lines.
        delimiter: what separates cells; None if nothing does.
    """

    where: str
    size: int
    names: Sequence[str]
    column: Callable[[str], list[Any]]
    classes: Mapping[str, list[str]] = field(default_factory=dict)
    lines: Sequence[int] | None = None
    delimiter: str | None = None

    def row_location(self, row: int) -> str:
        """The number of a row, and its line."""
        return row_location(row, self.lines)


def read_table(file: Path, where: str | None = None) -> Table:
    """Read all rows of a file.

    Args:
        file: its ending, in upper or lower case, tells its format: .csv, .tsv, .json, .jsonl or .parquet, followed by
            .gz, .bz2 or .xz if it is packed.
        where: the name of the table in messages about its columns; None for the path.

    Raises:
        FileNotFoundError: the file does not exist.
        ImportError: pyarrow is missing, which Parquet needs.
        ValueError: the file cannot be read; the message says in which row, why, and what to do.
    """
    ending = stem_and_ending(file.name)[1]
    if ending not in _READABLE:
        raise ValueError(
            f"{file} ends in {file.suffix!r}; the endings that can be read are {', '.join(ENDINGS)}, "
            f"each also followed by {', '.join(_PACKED)}"
        )
    if not file.is_file():  # reading a pipe would wait forever
        raise FileNotFoundError(f"{file} is a broken link or not a regular file")
    data = _unpacked(file, "." + ending.split(".")[-1])
    if not data:
        raise ValueError(f"{file} is empty")
    where = where or str(file)
    match "." + ending.split(".")[1]:
        case ".csv":
            table = _delimited_table(read_csv(_decoded(data, file), str(file)), where, ",")
        case ".tsv":
            table = _delimited_table(read_tsv(_decoded(data, file), str(file)), where, "\t")
        case ".parquet":
            table = _parquet_table(data, file, where)
        case _:
            table = _json_table(_decoded(data, file), file, where)
    if not table.size:
        raise ValueError(f"{file} has no rows")
    twice = sorted(name for name, count in Counter(table.names).items() if name and count > 1)
    if twice:  # columns without a name are allowed: many tables end with some
        raise ValueError(f"{file} has several columns with the name {twice[0]!r}; rename all but one")
    return table


def stem_and_ending(name: str) -> tuple[str, str]:
    """The name of a file without its ending, and the ending in lower case; an unknown one begins at the first point."""
    ending = next((ending for ending in reversed(_READABLE) if name.lower().endswith(ending)), None)
    if ending is None:
        stem, point, rest = name.partition(".")
        return stem, (point + rest).lower()
    return name[: -len(ending)], ending


def is_readable(name: str) -> bool:
    """Whether `read_table` reads files with this ending."""
    return stem_and_ending(name)[1] in _READABLE


def shortened(names: Sequence[str]) -> str:
    """Up to ten names, for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _unpacked(file: Path, ending: str) -> bytes:
    if ending not in _PACKED:
        return file.read_bytes()
    module = import_module(_PACKED[ending])  # some builds of Python lack lzma
    try:
        with module.open(file) as opened:
            return opened.read()
    except (OSError, EOFError, zlib.error, getattr(module, "LZMAError", EOFError)) as error:
        raise ValueError(
            f"{file} cannot be unpacked: {error or 'it ends too early'}; is the {ending} file complete?"
        ) from None


def _decoded(data: bytes, file: Path) -> str:
    for start, other in _OTHER_FORMATS.items():
        if data.startswith(start):
            raise ValueError(f"{file} {other}")
    mark, encoding = next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), (b"", "UTF-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        raise ValueError(
            f"{file} is not {encoding}: byte 0x{data[offset]:02x} at offset {offset} (line {_line(data, offset)}) is "
            f"invalid; save it as UTF-8, or if it comes from Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        ) from None
    if "\0" in text:
        offset = data.index(b"\0")
        raise ValueError(
            f"{file} holds a NUL byte at offset {offset} (line {_line(data, offset)}): it is not text, or it is UTF-16 "
            f"without a byte order mark; then: iconv -f UTF-16{'LE' if offset else 'BE'} -t UTF-8 OLD > NEW"
        )
    return text


def _line(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _delimited_table(cells: Cells, where: str, delimiter: str) -> Table:
    names, rows, lines = cells

    def column(name: str) -> list[str]:
        index = names.index(name)
        return [row[index] for row in rows]

    return Table(where, len(rows), names, column, lines=lines, delimiter=delimiter)


def _json_table(text: str, file: Path, where: str) -> Table:
    """A list of objects, or an object on each line that is not blank, whatever the ending."""
    lines: list[int] | None = None
    if text.lstrip().startswith("["):
        rows = _parsed(text, file)
    else:
        written = [(number, line) for number, line in enumerate(StringIO(text, newline=None), 1) if line.strip()]
        lines = [number for number, _ in written]
        rows = [_parsed(line.rstrip("\n"), file, number) for number, line in written]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}: {row_location(number, lines)} is {json.dumps(row)[:40]}, but each row must be an object"
            )
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(where, len(rows), names, lambda name: [row.get(name) for row in rows], lines=lines)


def _parsed(text: str, file: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        line, reason = line or error.lineno, f"{error.msg}, column {error.colno}"
    except ValueError as error:
        reason = str(error)
    raise ValueError(
        f"{file}{'' if line is None else f', line {line},'} cannot be read as JSON: {reason}; write one list of "
        "objects, or one object on each line"
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"an object holds {next(name for name in names if names.count(name) > 1)!r} twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parquet_table(data: bytes, file: Path, where: str) -> Table:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError("reading Parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        table = ParquetFile(pyarrow.BufferReader(data)).read()
        table.validate(full=True)  # checks that strings are UTF-8
        classes = _declared_classes(table.schema)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from None
    return Table(where, table.num_rows, table.column_names, lambda name: table[name].to_pylist(), classes)


def _declared_classes(schema: Any) -> dict[str, list[str]]:
    """The class names that the package `datasets` stores in the schema of a table."""
    classes: dict[str, list[str]] = {}
    match json.loads((schema.metadata or {}).get(b"huggingface", b"{}")):
        case {"info": {"features": dict(features)}}:
            for name, feature in features.items():
                match feature:  # a list column is a list, or an object with the feature of its items
                    case (
                        {"_type": "ClassLabel", "names": list(names)}
                        | [{"_type": "ClassLabel", "names": list(names)}]
                        | {"feature": {"_type": "ClassLabel", "names": list(names)}}
                    ):
                        classes[name] = names
    return classes
