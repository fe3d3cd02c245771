"""docs/models.md holds what `make models-table` would write, as far as that shows without running it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def table() -> Any:
    spec = importlib.util.spec_from_file_location("models_table", Path(__file__).with_name("models_table.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(family: Any) -> dict[str, set[str]]:
    """What passes in every family, and what does not apply to it."""
    writes = family.kind in ("encoder-decoder", "decoder")
    slides = getattr(family.config, "sliding_window", None)
    return {
        "placement": {"prefix", "input"},
        "backend": {"reference", "native"} | (set() if "soft-capping" in family.note else {"composed"}),
        "generates": {"yes"} if writes else set(),
        "assisted": {"yes"} if family.kind == "decoder" and not slides else set(),
        "checkpoints": {"yes"},
    }


def test_the_page_lists_the_families_of_the_tests_and_what_they_prove(table: Any, families: dict[str, Any]) -> None:
    found = {name: expected(family) for name, family in families.items()}
    assert table.part(table.PAGE.read_text(), "families") == table.families_table(families, found)


def test_the_page_lists_what_is_refused_with_the_errors(table: Any, refused: dict[str, Any]) -> None:
    assert table.part(table.PAGE.read_text(), "refused") == table.refused_table(refused)


def test_the_page_says_with_what_it_was_made(table: Any) -> None:
    text = table.part(table.PAGE.read_text(), "versions")
    assert text.startswith("Made with transformers ") and " and PyTorch " in text


def test_every_column_has_a_test_that_fills_it(table: Any) -> None:
    written = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for test in table.COLUMNS:
        assert f"def {test}(" in written
