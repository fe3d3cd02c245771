"""How commands end: one line for what a user can fix, a note for a warning about data, whatever a pipe does."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer

from qtuning_fast.cli_output import readable_errors
from qtuning_fast.lifelong.data.tables import DataWarning


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("steps is 0"), 2, "error: steps is 0"),
        (FileNotFoundError("nowhere holds no run"), 2, "error: nowhere holds no run"),
        (ModuleNotFoundError("No module named 'sklearn'"), 2, "pip install 'qtuning_fast[lifelong]'"),
        (ImportError("serving needs ray: pip install it"), 2, "error: serving needs ray: pip install it"),
        (KeyboardInterrupt(), 130, "Interrupted. Nothing is kept."),
    ],
)
def test_errors_end_in_one_line(error: BaseException, code: int, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, readable_errors("Nothing is kept."):
        raise error
    printed = capfd.readouterr()
    assert caught.value.exit_code == code and said in printed.out + printed.err and "Traceback" not in printed.err


def test_what_no_user_can_fix_is_raised() -> None:
    with pytest.raises(RuntimeError, match="a fault"), readable_errors():
        raise RuntimeError("a fault")


def test_warnings_about_data_are_notes(capfd: pytest.CaptureFixture[str]) -> None:
    with readable_errors():
        warnings.warn("two rows have no label", DataWarning, stacklevel=1)
    assert capfd.readouterr().err == "note: two rows have no label\n"


def test_a_reader_that_has_gone_ends_nothing() -> None:
    code = "from qtuning_fast.cli_output import console\nfor _ in range(9000): console.print('x' * 99)\nprint(1 / 1)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = f'{sys.executable} -c "$CODE" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], env=environment | {"CODE": code}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
