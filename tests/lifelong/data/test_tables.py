"""Files of every making: what is in them is read to the letter, or they are refused by name, row and reason."""

from __future__ import annotations

import bz2
import datetime
import gzip
import lzma
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from qtuning_fast.lifelong.data.loading import load_examples, load_task
from qtuning_fast.lifelong.data.tables import read_table
from qtuning_fast.lifelong.data.text_columns import read_labels, read_texts


def rows_of(file: Path) -> list[tuple[str, str]]:
    table = read_table(file)
    return list(zip(read_texts(table, "text"), read_labels(table, "label")[0]))


PLAIN = [("a film", "good"), ("a play", "bad")]
CSV = b"text,label\na film,good\na play,bad\n"
TSV = CSV.replace(b",", b"\t")
JSON = b'[{"text": "a film", "label": "good"}, {"text": "a play", "label": "bad"}]'
JSONL = b'{"text": "a film", "label": "good"}\n{"text": "a play", "label": "bad"}\n'


def labels(*each: str) -> bytes:
    """A CSV file with these cells as labels."""
    return ("text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(each))).encode()


def as_labels(*each: str) -> list[tuple[str, str]]:
    return [(f"text {i}", label) for i, label in enumerate(each)]


def lines(*values: str) -> bytes:
    """A JSONL file with these values, as they are written, as labels."""
    return "\n".join(f'{{"text": "text {i}", "label": {value}}}' for i, value in enumerate(values)).encode()


READ: dict[str, tuple[str, bytes, list[tuple[str, str]]]] = {
    # Encodings and line ends
    "UTF-8": ("a.csv", "text,label\ncafé 日本 😀,büro\n".encode(), [("café 日本 😀", "büro")]),
    "UTF-8 with a mark": ("a.csv", b"\xef\xbb\xbf" + CSV, PLAIN),
    "UTF-16 little-endian": ("a.csv", CSV.decode().encode("utf-16"), PLAIN),
    "UTF-16 big-endian": ("a.tsv", b"\xfe\xff" + TSV.decode().encode("utf-16-be"), PLAIN),
    "UTF-32": ("a.jsonl", JSONL.decode().encode("utf-32"), PLAIN),
    "JSON with a mark": ("a.json", b"\xef\xbb\xbf" + JSON, PLAIN),
    "lines of Windows": ("a.csv", CSV.replace(b"\n", b"\r\n"), PLAIN),
    "lines of old Macs": ("a.csv", CSV.replace(b"\n", b"\r"), PLAIN),
    "JSONL with lines of Windows": ("a.jsonl", JSONL.replace(b"\n", b"\r\n"), PLAIN),
    "no line end at the end": ("a.tsv", TSV.rstrip(), PLAIN),
    "blank lines": ("a.csv", b"\n" + CSV.replace(b"\n", b"\n\n") + b"\n\n", PLAIN),
    "an ending in upper case": ("A.CSV", CSV, PLAIN),
    # No guessing of types
    "leading zeros": ("a.csv", labels("01", "1", "001"), as_labels("01", "1", "001")),
    "true and True": ("a.csv", labels("true", "False", "true"), as_labels("true", "False", "true")),
    "words for nothing": ("a.csv", labels("NA", "None", "null", "nan"), as_labels("NA", "None", "null", "nan")),
    "kinds of numbers": ("a.csv", labels("1.0", "1e3", "0x1", "1_0"), as_labels("1.0", "1e3", "0x1", "1_0")),
    "dates": ("a.csv", b"text,label\n2024-01-05,2024-01-05T00:00:00Z\n", [("2024-01-05", "2024-01-05T00:00:00Z")]),
    "texts of digits": ("a.csv", b"text,label\n007,1\n 1.50,2\n", [("007", "1"), (" 1.50", "2")]),
    "long integers": ("a.csv", labels("9007199254740993", "1" * 40), as_labels("9007199254740993", "1" * 40)),
    "labels in white space": ("a.csv", labels(" good", "bad "), as_labels("good", "bad")),
    "names in white space": ("a.csv", b" text , label\nx,good\n", [("x", "good")]),
    "a column of numbers of rows": ("a.csv", b",text,label\n0,x,good\n", [("x", "good")]),
    "columns without names": ("a.csv", b"text,label,,\nx,good,,\n", [("x", "good")]),
    # JSON
    "JSON": ("a.json", JSON, PLAIN),
    "JSONL": ("a.jsonl", JSONL, PLAIN),
    "JSONL called JSON": ("a.json", JSONL, PLAIN),
    "JSON called JSONL": ("a.jsonl", JSON, PLAIN),
    "blank lines in JSONL": ("a.jsonl", b"\n" + JSONL.replace(b"\n", b"\n \n"), PLAIN),
    "booleans of JSON": ("a.jsonl", lines("true", "false"), as_labels("true", "false")),
    "integers of JSON": ("a.jsonl", lines("10", "9007199254740993", "-1"), as_labels("10", "9007199254740993", "-1")),
    "dates of JSON": ("a.jsonl", lines('"2024-01-05"', '"x"'), as_labels("2024-01-05", "x")),
    "digits of JSON": ("a.jsonl", lines('"01"', '"1"'), as_labels("01", "1")),
    "a line separator in JSON": (
        "a.jsonl",
        '{"text": "a\u2028b\x85", "label": "x"}\n'.encode(),
        [("a\u2028b\x85", "x")],
    ),
    "an escape in JSON": ("a.jsonl", rb'{"text": "\ud83d\ude00", "label": "x"}', [("😀", "x")]),
    "another column of another kind": (
        "a.jsonl",
        b'{"text":"a","label":"x","n":1}\n{"text":"b","label":"y","n":[{}]}',
        [("a", "x"), ("b", "y")],
    ),
    # Packed
    "gzip": ("a.csv.gz", gzip.compress(CSV), PLAIN),
    "gzip of several parts": ("a.csv.gz", gzip.compress(CSV) + gzip.compress(b"x,good\n"), [*PLAIN, ("x", "good")]),
    "bzip2": ("a.jsonl.bz2", bz2.compress(JSONL), PLAIN),
    "xz": ("a.TSV.XZ", lzma.compress(TSV), PLAIN),
}


@pytest.mark.parametrize("case", READ)
def test_it_is_read_to_the_letter(case: str, tmp_path: Path) -> None:
    name, content, expected = READ[case]
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == expected


REFUSED: dict[str, tuple[str, bytes, str]] = {
    # Encodings
    "Latin-1": (
        "a.csv",
        "text,label\nx,y\ncafé,good\n".encode("latin-1"),
        "byte 0xe9 at offset 18 (line 3) is invalid; save it as UTF-8, or if it comes from Windows: iconv -f",
    ),
    "cut within a character": ("a.jsonl", '{"text": "é'.encode()[:-1], "is not UTF-8: byte 0xc3 at offset 10 (line 1)"),
    "UTF-16 without a mark": (
        "a.csv",
        CSV.decode().encode("utf-16-le"),
        "holds a NUL byte at offset 1 (line 1): it is not text, or it is UTF-16 without a byte order mark; then: iconv",
    ),
    "UTF-16 big-endian without a mark": (
        "a.csv",
        CSV.decode().encode("utf-16-be"),
        "holds a NUL byte at offset 0 (line 1): it is not text, or it is UTF-16 without a byte order mark; then: "
        "iconv -f UTF-16BE",
    ),
    "cut UTF-16": ("a.csv", CSV.decode().encode("utf-16")[:-1], "is not UTF-16LE: byte 0x0a at offset"),
    "a NUL byte": ("a.csv", b"text,label\nx\0y,good\n", "holds a NUL byte at offset 12 (line 2)"),
    # JSON
    "a broken line": (
        "a.jsonl",
        JSONL + b'\n{"text": "x", "lab',
        "line 4, cannot be read as JSON: Unterminated string",
    ),
    "a broken list": (
        "a.json",
        b'[{"text": "x",\n "label" "y"}]',
        "line 2, cannot be read as JSON: Expecting ':' delimiter, column 10",
    ),
    "two lists": ("a.json", b"[]\n[]", "line 2, cannot be read as JSON: Extra data"),
    "one object over lines": (
        "a.json",
        b'{\n"text": "x"\n}',
        "line 1, cannot be read as JSON: Expecting property name",
    ),
    "columns of lists": (
        "a.json",
        b'{"text": ["a", "b"], "label": ["x", "y"]}',
        "column 'text' in row 1 holds ['a', 'b'], of the kind list, but it must be a string",
    ),
    "a list in an object": (
        "a.json",
        b'{"data": [{"text": "a", "label": "x"}]}',
        "there is no column 'text', only 'data'; name yours with --text-column (in Python text_column)",
    ),
    "a row that is no object": (
        "a.json",
        b'[{"text": "a", "label": "x"}, ["b", "y"]]',
        'row 2 is ["b", "y"], but each row must be an object',
    ),
    "a key twice": (
        "a.jsonl",
        b'{"text": "a", "label": "x", "text": "b"}',
        "line 1, cannot be read as JSON: an object holds 'text' twice",
    ),
    "NaN": ("a.jsonl", lines('"x"', "NaN"), "line 2, cannot be read as JSON: NaN is not JSON"),
    "a number for infinity": (
        "a.json",
        b'[{"text": "a", "label": -Infinity}]',
        "cannot be read as JSON: -Infinity is not JSON",
    ),
    "a row without a label": (
        "a.jsonl",
        b"\n" + lines('"x"') + b'\n{"text": "b"}',
        "column 'label' is empty in 1 of 2 rows, first in row 2 (line 3)",
    ),
    "a label of nothing": ("a.jsonl", lines('"x"', "null"), "column 'label' is empty in 1 of 2 rows, first in row 2"),
    "1 and '1'": (
        "a.jsonl",
        lines("1", "1", '"1"'),
        "column 'label' in row 3 holds '1', a string, but in row 1 1, an integer; write all labels in one way",
    ),
    "1 and true": (
        "a.jsonl",
        lines("1", "true"),
        "column 'label' in row 2 holds true, a boolean, but in row 1 1, an integer",
    ),
    "fractions": (
        "a.jsonl",
        lines("1.0", "2.0"),
        "column 'label' in row 1 holds 1.0, a number with a fraction, but labels must be strings",
    ),
    "a list of labels": (
        "a.jsonl",
        lines('["x", "y"]'),
        "column 'label' in row 1 holds ['x', 'y'], of the kind list, but labels must be",
    ),
    "a text that is a number": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": 3, "label": "x"}',
        "column 'text' in row 2 holds 3, an integer, but it must be a string",
    ),
    "half a character": (
        "a.jsonl",
        rb'{"text": "a \ud83d", "label": "x"}',
        "column 'text' in row 1 holds half a character",
    ),
    "nested too deeply": ("a.json", b"[" * 100_000, "cannot be read as JSON: it is nested too deeply"),
    # Packed, and other kinds of files
    "cut gzip": ("a.csv.gz", gzip.compress(CSV)[:-9], "cannot be unpacked: "),
    "flipped gzip": (
        "a.csv.gz",
        gzip.compress(CSV)[:-6] + b"\xff" + gzip.compress(CSV)[-5:],
        "cannot be unpacked: CRC check failed",
    ),
    "no gzip": ("a.csv.gz", CSV, "cannot be unpacked: Not a gzipped file (b'te'); is the .gz file complete?"),
    "cut bzip2": ("a.jsonl.bz2", bz2.compress(JSONL)[:-9], "cannot be unpacked: Compressed file ended"),
    "no xz": ("a.tsv.xz", TSV, "cannot be unpacked: Input format not supported"),
    "nothing packed": ("a.csv.gz", gzip.compress(b""), "is empty"),
    "gzip without its ending": ("a.csv", gzip.compress(CSV), "is packed with gzip; add .gz to its name"),
    "bzip2 without its ending": ("a.csv", bz2.compress(CSV), "is packed with bzip2; add .bz2 to its name"),
    "xz without its ending": ("a.csv", lzma.compress(CSV), "is packed with xz; add .xz to its name"),
    "old Excel called CSV": ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an old Excel file; save it as CSV"),
    "Excel called CSV": (
        "a.csv",
        b"PK\x03\x04 and so on",
        "is a ZIP archive or an Excel file; unpack it, or save it as CSV",
    ),
    "Excel": (
        "a.xlsx",
        b"PK\x03\x04",
        "can be read are .csv, .tsv, .json, .jsonl, .parquet, each also followed by .gz, .bz2, .xz",
    ),
    "ZIP": ("a.csv.zip", b"PK\x03\x04", "ends in '.zip'"),
    "Zstandard": ("a.json.zst", b"x", "ends in '.zst'"),
    "text": ("a.txt", b"x", "ends in '.txt'"),
    "no Parquet": ("a.parquet", CSV, "cannot be read as Parquet: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name_row_and_reason(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        rows_of(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name))


# Parquet, which declares its types


@pytest.mark.parametrize(
    ("texts", "labels", "expected"),
    [
        (["a", "b"], ["01", "1"], ["01", "1"]),
        (["a", "b"], pyarrow.array([2, 1], pyarrow.uint8()), ["2", "1"]),
        (["a", "b"], [True, False], ["true", "false"]),
        (pyarrow.array(["a", "b"], pyarrow.large_string()), pyarrow.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (["a", "b"], [0.5, 1.0], "column 'label' in row 1 holds 0.5, a number with a fraction"),
        (["a", "b"], ["x", None], "column 'label' is empty in 1 of 2 rows, first in row 2"),
        ([datetime.date(2024, 1, 5)] * 2, ["x", "y"], "column 'text' in row 1 holds 2024-01-05, of the kind date"),
        ([datetime.datetime(2024, 1, 5)] * 2, ["x", "y"], "column 'text' in row 1 holds 2024-01-05 00:00:00, of the"),
        ([b"a", b"b"], ["x", "y"], "column 'text' in row 1 holds b'a', of the kind bytes"),
        ([["a"], ["b"]], ["x", "y"], "column 'text' in row 1 holds ['a'], of the kind list"),
        ([], [], "has no rows"),
    ],
)
def test_parquet_keeps_the_types_that_it_declares(texts: Any, labels: Any, expected: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), file)
    if isinstance(expected, list):
        assert rows_of(file) == list(zip(["a", "b"], expected))
        file.with_suffix(".parquet.gz").write_bytes(gzip.compress(file.read_bytes()))
        assert rows_of(file.with_suffix(".parquet.gz")) == rows_of(file)
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        rows_of(file)


def declaring(file: Path, labels: Any, declared: bytes) -> Path:
    """A file with these labels, and what the package `datasets` writes beside a table."""
    table = pyarrow.table({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    pyarrow.parquet.write_table(table.replace_schema_metadata({b"huggingface": declared}), file)
    return file


@pytest.mark.parametrize(
    ("labels", "shown"),
    [([0, 2], "row 2 holds 2"), (["no", "yes"], "row 1 holds 'no'"), ([1.0, 0.0], "row 1 holds 1.0")],
)
def test_a_class_that_a_file_does_not_declare(labels: list[Any], shown: str, tmp_path: Path) -> None:
    declared = b'{"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}'
    with pytest.raises(ValueError, match=rf"column 'label' in {shown}, but it declares 2 classes, numbered from 0"):
        rows_of(declaring(tmp_path / "a.parquet", labels, declared))


@pytest.mark.parametrize(
    "declared",
    [
        b'{"info": {"features": {"label": {"dtype": "string", "_type": "Value"}, "spans": [{"_type": "Value"}]}}}',
        b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
        b'{"info": {"features": null}}',
        b'{"info": null}',
        b"[]",
    ],
)
def test_what_declares_no_classes(declared: bytes, tmp_path: Path) -> None:
    assert rows_of(declaring(tmp_path / "a.parquet", ["yes", "no"], declared)) == as_labels("yes", "no")


def test_strings_of_parquet_that_are_no_utf8(tmp_path: Path) -> None:
    buffers = pyarrow.array([b"a", b"\xff"]).buffers()
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet: .*UTF8"):
        rows_of(tmp_path / "a.parquet")


# Through the door that users take


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for labels in (("good", "bad"), ("best", "dim")):  # as long, and at the same time
        file.write_text("text,label\n" + "".join(f"text {i},{labels[i % 2]}\n" for i in range(20)))
        os.utime(file, ns=(0, 0))
        assert load_task(str(file), validation_shots=1).label_names == sorted(labels)


@pytest.mark.parametrize("case", ["leading zeros", "true and True", "kinds of numbers", "words for nothing"])
def test_labels_reach_the_task_as_they_are_written(case: str, tmp_path: Path) -> None:
    labels = list(dict.fromkeys(label for _, label in READ[case][2]))
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"text {i},{labels[i % len(labels)]}\n" for i in range(40))
    )
    task = load_task(str(tmp_path / "a.csv"), validation_shots=1)
    assert task.label_names == sorted(labels)
    for part in (task.train, task.validation, task.test):
        for text, label in zip(part.inputs, part.labels):
            assert task.label_names[label] == labels[int(str(text).split()[1]) % len(labels)]


def test_examples_for_a_task_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("body\tkind\nx\t01\ny\t1\n")
    columns = {"text_column": "body", "label_column": "kind"}
    assert load_examples(str(tmp_path / "a.tsv"), ["1", "01"], **columns).labels == [1, 0]
    with pytest.raises(
        ValueError, match=r"a.tsv: label '1' is not a label of the task, which has 0, 01; it is in row 2 \(line 3\)"
    ):
        load_examples(str(tmp_path / "a.tsv"), ["0", "01"], **columns)


def test_what_is_as_it_should_be_is_not_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CSV)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows_of(tmp_path / "a.csv")


def test_a_task_is_named_without_the_endings(tmp_path: Path) -> None:
    file = tmp_path / "reviews.v2.csv.gz"
    file.write_bytes(gzip.compress(b"text,label\n" + b"".join(b"text %d,%d\n" % (i, i % 2) for i in range(20))))
    assert load_task(str(file), validation_shots=1).name == "reviews.v2"
