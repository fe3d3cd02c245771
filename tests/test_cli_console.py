"""What commands print of errors, warnings and interrupts."""

from __future__ import annotations

import warnings

import pytest
import typer

from qtuning_fast.cli_console import console, readable_errors, silence_libraries
from qtuning_fast.lifelong.data.tables import DataWarning


@pytest.mark.parametrize("error", [ValueError("a [b] c"), OSError("no file"), TypeError("wrong"), ImportError("none")])
def test_an_error_is_one_line_and_exit_code_2(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, readable_errors():
        raise error
    assert caught.value.exit_code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_package_that_is_missing_is_named_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), readable_errors():
        import no_such_package  # noqa: F401
    assert "no_such_package" in (said := capsys.readouterr().err) and "pip install 'qtuning_fast[lifelong]'" in said


def test_a_fault_of_our_own_is_no_users_error() -> None:
    with pytest.raises(ZeroDivisionError), readable_errors():
        raise ZeroDivisionError


def test_an_interrupt_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, readable_errors("Nothing is kept."):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130 and "Interrupted. Nothing is kept." in capsys.readouterr().out


def test_a_warning_about_data_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    with readable_errors():
        warnings.warn("two columns look alike", DataWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: two columns look alike\n"


def test_a_reader_who_leaves_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "quiet", False)
    monkeypatch.setattr("qtuning_fast.cli_console.os.dup2", lambda *_: None)
    console.on_broken_pipe()
    assert console.quiet


def test_libraries_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(warnings, "filters", list(warnings.filters))
    transformers.logging.set_verbosity_info()
    silence_libraries()
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR
