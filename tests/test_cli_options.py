"""The options of the command line are the settings of the dataclasses, and the docs list them.

`python tests/test_cli_options.py` writes the tables into the pages of the commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from qtuning_fast.cli import app
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.settings import settings_of
from qtuning_fast.serving.options import ServingOptions

RECIPES = Path(__file__).parent.parent / "docs" / "recipes"
WRITTEN = re.compile(r"(<!-- begin settings.*?-->\n).*(<!-- end settings -->)", re.DOTALL)
# The page of each command, and the settings in each panel of its help.
PAGES: dict[str, tuple[Path, dict[str, type]]] = {
    "run": (
        RECIPES / "lifelong.md",
        {"Data": DataOptions, "Method": QTuningConfig, "Training of each task": TrainingOptions},
    ),
    "serve": (RECIPES / "serving.md", {"Serving": ServingOptions}),
}


def options(name: str = "run") -> list[Any]:
    command: Any = typer.main.get_command(app)
    return command.commands[name].params


def tables(command: str) -> Iterator[str]:
    """Markdown: a table for each group of options."""
    panels = PAGES[command][1]
    more = {each.name: each.more for settings in panels.values() for each in settings_of(settings)}
    for panel, settings in panels.items():
        yield from ("", f"**{panel}** (`{settings.__name__}`)", "")
        yield from ("| option | default | what it sets |", "|---|---|---|")
        for option in options(command):
            if option.rich_help_panel == panel:
                default = "" if option.default in (None, ()) else f"`{option.default}`"
                text = " ".join((option.help, more.get(option.name, ""))).strip()
                yield f"| `{option.opts[0]}` | {default} | {text} |"
    yield ""


def page(command: str) -> str:
    text = PAGES[command][0].read_text()
    return WRITTEN.sub(lambda found: found[1] + "\n".join(tables(command)) + "\n" + found[2], text)


@pytest.mark.parametrize("command", PAGES)
def test_the_docs_list_every_option(command: str) -> None:
    assert PAGES[command][0].read_text() == page(command), "run: python tests/test_cli_options.py"


def test_every_setting_is_an_option_with_the_same_default() -> None:
    given = {option.name: option.default for option in options()}
    repeated = ("tasks", "problem_types", "templates", "label_words")
    of_streams = ("queue_size", "task_type")
    for settings, left_out in ((DataOptions, {"seed"}), (QTuningConfig, set()), (TrainingOptions, {"seed"})):
        for each in fields(settings):
            if each.name in left_out | {"eval_batch_size", *of_streams, *repeated}:
                continue
            expected = "none" if each.default is None and given[each.name] == "none" else each.default
            assert given[each.name] == expected, each.name
    assert all(given[name] is None for name in of_streams)  # the stream has a say
    assert all(given[name] in (None, [], ()) for name in repeated)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gate": "none", "layers": "0,2", "reparameterization": "none"}, {"gate": None, "layers": (0, 2)}),
        ({"gate": "tanh", "layers": None, "reparameterization": "mlp"}, {"gate": "tanh", "layers": None}),
    ],
)
def test_options_become_settings(options: dict[str, Any], expected: dict[str, Any]) -> None:
    from qtuning_fast.cli import _METHOD

    given = {each.name: each.default for each in settings_of(QTuningConfig)} | options
    config = _METHOD.read(given)
    assert {name: getattr(config, name) for name in expected} == expected
    with pytest.raises(ValueError, match="layers is '0,,1'; it must be indices such as 0,1,2"):
        _METHOD.read(given | {"layers": "0,,1"})


if __name__ == "__main__":
    for name, (path, _) in PAGES.items():
        path.write_text(page(name))
