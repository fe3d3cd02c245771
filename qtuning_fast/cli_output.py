"""What commands print, and how they end: one line for an error that a user can fix, a note for a warning about data."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer
from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # the reader of the pipe has exited; the run continues
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console()


@contextmanager
def readable_errors(
    interrupted: str = "What is finished is kept: the same command resumes from here.",
) -> Iterator[None]:
    """Report an error that a user can fix in one line with exit code 2; on Ctrl-C, say how to resume."""
    try:
        with _warnings_as_notes():
            yield
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. {interrupted}")
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        said = (
            f"{error}: pip install 'qtuning_fast[lifelong]'" if isinstance(error, ModuleNotFoundError) else str(error)
        )
        Console(stderr=True).print(f"error: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print each warning about the data on one line, without its source location."""
    from qtuning_fast.lifelong.data.tables import DataWarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, DataWarning):
            Console(stderr=True).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("default", DataWarning)
        yield


def silence_libraries() -> None:
    """Hide the progress bars and advice of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import transformers

    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
