"""Texts and labels out of tables: the order of classes, and what is pointed out."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest

from qtuning_fast.lifelong.data.delimited import read_csv
from qtuning_fast.lifelong.data.tables import DataWarning, Table
from qtuning_fast.lifelong.data.text_columns import (
    check_known_labels,
    read_label_sets,
    read_labels,
    read_numbers,
    warn_about_joined_rows,
)


def table(labels: list[Any], **more: Any) -> Table:
    return Table("a.csv", len(labels), ["text", "label"], lambda name: labels, **more)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "2"], ["2", "9", "10"]),
        ([10, 9, -2], ["-2", "9", "10"]),
        (["10", "9", "02"], ["02", "10", "9"]),
        (["10", "9", "-0"], ["-0", "10", "9"]),
        (["10", "9", "1.0"], ["1.0", "10", "9"]),
        (["10", "9", "١"], ["10", "9", "١"]),
        (["b", "B", "a"], ["B", "a", "b"]),
    ],
)
@pytest.mark.filterwarnings("ignore::qtuning_fast.lifelong.data.tables.DataWarning")
def test_classes_are_in_order_by_number_where_all_are_integers(labels: list[Any], names: list[str]) -> None:
    assert read_labels(table(labels), "label")[1] == names


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["Spam", "spam", "spam", "ham"], "holds 'Spam' 1 times, 'spam' 2 times: they are 2 classes"),
        (["very good", "very  good", "x"], "holds 'very good' 1 times, 'very  good' 1 times: they are 2 classes"),
        (["ham", " ham", "x", "ham"], "holds 'ham' 2 times, ' ham' 1 times: they are read as one, 'ham'"),
        (["caf\u00e9", "cafe\u0301"], "they are 2 classes"),
        (["good", "good\u200b", "\ufeffgood", "\u200fgood", "go\u00adod"], "they are 5 classes"),
    ],
)
def test_labels_that_look_alike_are_pointed_out(labels: list[str], said: str) -> None:
    with pytest.warns(DataWarning, match=f"^a.csv: column 'label' .*{said}$"):
        read_labels(table(labels), "label")


def test_labels_that_do_not_look_alike_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_labels(table([" good", " bad", "1", "01", "١"]), "label")
        read_labels(table([1, 2, 11]), "label")


def test_a_text_that_holds_a_row_is_pointed_out() -> None:
    texts = ["one\ntwo, three", "Great film,good\nbad film"]
    said = r"column 'text' in row 2 \(line 4\) holds a line that looks like .* 'Great film,good'"
    with pytest.warns(DataWarning, match=said):
        warn_about_joined_rows(table(texts, lines=[2, 4], delimiter=","), ["good", "bad"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_joined_rows(table(texts[:1], lines=[2, 4], delimiter=","), ["good", "bad"])
        warn_about_joined_rows(table(texts), ["good", "bad"])  # of JSON, which has no such quotes


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("id,text,label", '7,"Great film,good\n8,awful",bad', "'text' in row 1 .* 'Great film,good'"),
        ("id,text,label,by", '7,"Great film,good,x\n8,awful",bad,y', "'text' in row 1 .* 'Great film,good,x'"),
        ("note,text,label", '"so,Great film,good\nso",awful,bad', "'note' in row 1 .* 'so,Great film,good'"),
        ("label,note,text", 'good,"so,Great film\nbad,so",awful', "'note' in row 1 .* 'bad,so'"),
        ("id,text,label", '7,"one, two, good, three\nfour, bad",bad', None),
        ("id,text,label", '7,"one\nin a word: good",bad', None),
    ],
)
def test_two_rows_that_a_stray_quote_joins_are_pointed_out(header: str, row: str, said: str | None) -> None:
    cells = read_csv(f"{header}\n{row}\n", "a.csv")
    columns = dict(zip(cells.names, map(list, zip(*cells.rows))))
    joined = Table("a.csv", 1, cells.names, columns.__getitem__, lines=cells.lines, delimiter=",")
    with pytest.warns(DataWarning, match=said) if said else warnings.catch_warnings():
        if not said:
            warnings.simplefilter("error")
        warn_about_joined_rows(joined, ["good", "bad"])


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("Good", "; it looks like 'good' but is 'Good'"),
        ("go\u200bod", r"; it looks like 'good' but is 'go\u200bod'"),
        ("x", ""),
    ],
)
def test_an_unknown_label_that_looks_like_a_known_one(label: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"is new; it is in row 2{said}") + "$"):
        check_known_labels(table(["bad", label]), ["bad", label], ["bad", "good"], "is new")
    with pytest.raises(ValueError, match=re.escape(r"it looks like 'caf\xe9' but is 'cafe\u0301'")):
        check_known_labels(table([]), ["cafe\u0301"], ["caf\u00e9"], "is new")


CELLS = {"delimiter": ","}


@pytest.mark.parametrize(
    ("values", "more"),
    [
        (["red; blue", "", "blue", "green;red"], CELLS),
        ([["red", "blue"], [], ["blue"], ["green", "red"]], {}),
        ([[2, 0], [], [0], [1, 2]], {"classes": {"label": ["blue", "green", "red"]}}),
    ],
)
def test_a_text_may_have_several_labels(values: list[Any], more: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sets, names = read_label_sets(table(values, **more), "label")
    assert sets == [("red", "blue"), (), ("blue",), ("green", "red")] and names == ["blue", "green", "red"]


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        (["a;;b"], CELLS, "row 1 holds an empty label"),
        (["a", "a"], {}, "'a', a string, but it must be a list of labels"),
        ([["a"], None], {}, "row 2 holds nothing, but it must be a list"),
        ([["a"], ["b", 1]], {}, "row 2 holds 1, an integer, but in row 1 holds 'a'|1, an integer"),
        ([[0.5]], {}, "0.5, a number with a fraction"),
        ([[3]], {"classes": {"label": ["x", "y"]}}, "holds 3, but it declares 2 classes"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(values: list[Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_label_sets(table(values, **more), "label")


@pytest.mark.parametrize(
    ("values", "more", "numbers"),
    [([" 1.5", "-2", "1e3"], CELLS, [1.5, -2.0, 1000.0]), ([1, 2.5, -3], {}, [1.0, 2.5, -3.0])],
)
def test_numbers_are_read(values: list[Any], more: dict[str, Any], numbers: list[float]) -> None:
    assert read_numbers(table(values, **more), "label") == numbers


@pytest.mark.parametrize(
    ("values", "more"),
    [(["1", "nan"], CELLS), (["1", "two"], CELLS), ([1, "2"], {}), ([1, True], {}), ([1, 10**400], {}), ([1, [2]], {})],
)
def test_what_is_no_number_is_refused(values: list[Any], more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"row 2 holds .*regression needs finite numbers"):
        read_numbers(table(values, **more), "label")
    with pytest.raises(ValueError, match="empty in 1 of 2 rows"):
        read_numbers(table(["1", None]), "label")


@pytest.mark.parametrize("joined", ["red;blue", "red, blue", "red|blue"])
def test_several_labels_in_one_are_pointed_out(joined: str) -> None:
    with pytest.warns(DataWarning, match=re.escape(repr(joined)) + ".*set problem_type=.multi_label"):
        read_labels(table([joined, "blue", "green"], **CELLS), "label")
    if ";" not in joined:
        with pytest.warns(DataWarning, match=re.escape(repr(joined)) + ".*separate the labels of a cell by ';'"):
            read_label_sets(table([joined, "blue;green"], **CELLS), "label")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_labels(table([joined, "other"], **CELLS), "label")


def test_other_kinds_of_labels_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="multi_label_classification"):
        read_labels(table([["a"], ["b"]]), "label")
    with pytest.raises(ValueError, match="regression"):
        read_labels(table([0.5, 1.5]), "label")
