"""Texts and labels out of tables: the order of classes, and what is pointed out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from qtuning_fast.lifelong.data_files import DataWarning, Table
from qtuning_fast.lifelong.own_texts import labels_of, point_out_joined_rows


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
@pytest.mark.filterwarnings("ignore::qtuning_fast.lifelong.data_files.DataWarning")
def test_classes_are_in_order_by_number_where_all_are_integers(labels: list[Any], names: list[str]) -> None:
    assert labels_of(table(labels), "label")[1] == names


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["Spam", "spam", "spam", "ham"], "holds 'Spam' 1 times, 'spam' 2 times: they are 2 classes"),
        (["very good", "very  good", "x"], "holds 'very good' 1 times, 'very  good' 1 times: they are 2 classes"),
        (["ham", " ham", "x", "ham"], "holds 'ham' 2 times, ' ham' 1 times: they are read as one, 'ham'"),
        (["caf\u00e9", "cafe\u0301"], "they are 2 classes"),
    ],
)
def test_labels_that_look_alike_are_pointed_out(labels: list[str], said: str) -> None:
    with pytest.warns(DataWarning, match=f"^a.csv: column 'label' .*{said}$"):
        labels_of(table(labels), "label")


def test_labels_that_do_not_look_alike_are_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels_of(table([" good", " bad", "1", "01", "١"]), "label")
        labels_of(table([1, 2, 11]), "label")


def test_a_text_that_holds_a_row_is_pointed_out() -> None:
    texts = ["one\ntwo, three", "Great film,good\nbad film"]
    with pytest.warns(
        DataWarning, match=r"the text in row 2 \(line 4\) holds a line that looks like .* 'Great film,good'"
    ):
        point_out_joined_rows(table(texts, lines=[2, 4], delimiter=","), texts, ["good", "bad"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point_out_joined_rows(table(texts, lines=[2, 4], delimiter=","), texts[:1], ["good", "bad"])
        point_out_joined_rows(table(texts), texts, ["good", "bad"])  # of JSON, which has no such quotes
