"""The tables of docs/models.md, out of what the tests of every family came to.

A plugin for pytest, loaded by `make models-table`: it runs the tests that are told apart below, and no others, and
writes the page anew when all of them have passed. A cell says yes where tests passed, and nothing where there is none
for a family of this kind or all were skipped.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
KINDS = {
    "encoder": "encoder",
    "image": "image model",
    "encoder-decoder": "encoder-decoder",
    "decoder": "decoder",
}

# Which columns each test speaks for. A column of the name of one of the test's parameters holds its values that passed.
COLUMNS = {
    "test_logits_and_gradients_are_those_of_a_prefix_put_in_by_hand": ("placement", "backend"),
    "test_with_a_cache_as_without": ("generates",),
    "test_beams_find_what_they_find_without_a_cache": ("generates",),
    "test_a_mixed_batch_writes_what_each_task_writes_alone": ("generates",),
    "test_assisted_decoding_writes_the_same": ("assisted",),
    "test_checkpoints_of_either_kind_give_the_same_gradients": ("checkpoints",),
}
_MADE_BY = "<!-- made by `make models-table`: {} -->"
_END = "<!-- end -->"
BACKENDS = ("reference", "native", "composed")

Found = dict[str, dict[str, set[str]]]
"""By family and column, what passed."""


def families_table(families: dict[str, Any], found: Found) -> str:
    """A row for each family of the registry, in its order."""
    rows = [
        "| family | kind | prefix | input | backends | generates | assisted | checkpoints |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, family in families.items():
        passed = found.get(name, {})
        cells = [name, f"{KINDS[family.kind]}; {family.note}" if family.note else KINDS[family.kind]]
        cells += ["yes" if each in passed.get("placement", ()) else "" for each in ("prefix", "input")]
        cells += [", ".join(each for each in BACKENDS if each in passed.get("backend", ()))]
        cells += ["yes" if passed.get(column) else "" for column in ("generates", "assisted", "checkpoints")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def refused_table(refused: dict[str, Any]) -> str:
    """What attaching to each of them says."""
    from transformers import AutoModel

    from qtuning_fast import QTuningConfig, QTuningModel

    rows = ["| family | the error |", "|---|---|"]
    for name, (config, _) in refused.items():
        with pytest.raises(NotImplementedError) as error:
            QTuningModel(AutoModel.from_config(config), QTuningConfig())
        rows.append(f"| {name} | `{error.value}` |")
    return "\n".join(rows)


def made_with() -> str:
    versions = f"transformers {transformers.__version__} and PyTorch {torch.__version__.split('+')[0]}"
    return f"Made with {versions} by `make models-table`, which runs these tests and writes down what passed."


def part(page: str, name: str) -> str:
    """What stands between the markers of this name."""
    return page.split(_MADE_BY.format(name))[1].split(_END)[0].strip()


def with_part(page: str, name: str, text: str) -> str:
    """The page with this text between the markers of this name."""
    before, after = page.split(_MADE_BY.format(name))
    return f"{before}{_MADE_BY.format(name)}\n\n{text}\n\n{_END}{after.split(_END, 1)[1]}"


# As a plugin

_found: Found = defaultdict(lambda: defaultdict(set))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if getattr(item, "originalname", item.name) in COLUMNS]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        parameters = item.callspec.params  # type: ignore[attr-defined]
        family = next(parameters[name] for name in ("family", "writer", "decoder") if name in parameters)
        for column in COLUMNS[item.originalname]:  # type: ignore[attr-defined]
            item.user_properties.append((column, (family, parameters.get(column, "yes"))))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for column, (family, value) in report.user_properties:
            _found[family][column].add(value)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workerinput"):  # a process of pytest-xdist; the one that started it writes
        return
    if exitstatus != 0:
        return
    conftest = next(each for each in session.config.pluginmanager.get_plugins() if hasattr(each, "FAMILIES"))
    page = PAGE.read_text()
    page = with_part(page, "families", families_table(conftest.FAMILIES, _found))
    page = with_part(page, "refused", refused_table(conftest.REFUSED))
    page = with_part(page, "versions", made_with())
    PAGE.write_text(page)
