"""What commands print: errors on one line, notes, and nothing where another process speaks."""

from __future__ import annotations

import io
import sys
import warnings

import pytest
import typer
from rich.console import Console

from qtuning_fast import cli_console
from qtuning_fast.cli_console import readable_errors, silence_libraries
from qtuning_fast.lifelong.data.tables import DataWarning


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to stdout."""
    file = io.StringIO()
    monkeypatch.setattr(cli_console, "console", Console(file=file))
    return file


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("steps is [x]"), "error: steps is [x]\n"),
        (ModuleNotFoundError("No module named 'that'"), "No module named 'that': pip install 'qtuning_fast[lifelong]'"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, readable_errors():
        raise error
    assert ended.value.exit_code == 2
    assert said in capsys.readouterr().err


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError


def test_of_several_processes_one_that_fails_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qtuning_fast.model.distributed.process_count", lambda: 2)
    monkeypatch.setattr("qtuning_fast.model.distributed.process_number", lambda: 0)
    monkeypatch.setattr("qtuning_fast.lifelong.processes.leave", sys.exit)
    with pytest.raises(SystemExit) as ended, readable_errors():
        raise ZeroDivisionError
    assert ended.value.code == 1 and "ZeroDivisionError" in capsys.readouterr().err


def test_an_interrupt_says_what_is_kept(printed: io.StringIO) -> None:
    with pytest.raises(typer.Exit) as ended, readable_errors("Nothing is kept."):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130 and "Interrupted. Nothing is kept." in printed.getvalue()


@pytest.mark.parametrize("quiet", [False, True])
def test_a_note_is_printed_unless_another_process_prints_it(
    printed: io.StringIO, quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with readable_errors():
        cli_console.console.quiet = quiet
        warnings.warn("two texts are empty", DataWarning, stacklevel=1)
    assert (capsys.readouterr().err == "note: two texts are empty\n") == (not quiet)


def test_errors_of_what_a_launcher_says_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(typer.Exit) as ended, readable_errors():
        pytest.fail("joined")
    assert ended.value.exit_code == 2 and "WORLD_SIZE is 'many'" in capsys.readouterr().err


def test_a_reader_who_leaves_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_console.console, "quiet", False)
    monkeypatch.setattr("qtuning_fast.cli_console.os.dup2", lambda *_: None)
    cli_console.console.on_broken_pipe()
    assert cli_console.console.quiet


def test_libraries_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    transformers.logging.set_verbosity_info()
    silence_libraries()
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR
