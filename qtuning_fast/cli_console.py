"""What commands print: results, notes, and errors on one line; of several processes one speaks for all."""

from __future__ import annotations

import os
import sys
import traceback
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
    interrupted: str = "What is finished is kept: the same command resumes from here.", *, alone: str | None = None
) -> Iterator[None]:
    """Report an error that a user can fix in one line with exit code 2; on Ctrl-C, say how to resume.

    Of several processes that a launcher has started, the first one speaks for all.

    Args:
        interrupted: what to say on Ctrl-C.
        alone: the name of a command that runs in one process only.
    """
    from qtuning_fast.lifelong.processes import joined, leave, show_once
    from qtuning_fast.model.distributed import ProcessLostError, process_count, process_number

    def fail(error: Exception) -> typer.Exit:
        said = str(error)
        if isinstance(error, ModuleNotFoundError):
            said += ": pip install 'qtuning_fast[lifelong]'"
        if isinstance(error, ProcessLostError):
            said += f". {interrupted}"
        show_once(said, _show_error)
        leave(2)
        return typer.Exit(2)

    try:
        with joined():
            console.quiet = console.quiet or process_number() > 0
            try:
                if alone is not None and process_count() > 1:
                    raise ValueError(
                        f"{alone} runs in one process, but a launcher has started {process_count()}; start it without"
                    )
                with _warnings_as_notes():
                    yield
            except KeyboardInterrupt:
                console.print(f"\nInterrupted. {interrupted}")
                leave(130)
                raise typer.Exit(130) from None
            except _ERRORS as error:
                raise fail(error) from None
            except Exception:
                if process_count() > 1:  # the others wait for this process, which must not wait for them
                    traceback.print_exc()
                    leave(1)
                raise
    except _ERRORS as error:
        raise fail(error) from None


_ERRORS = (ValueError, TypeError, OSError, ImportError, NotImplementedError)  # that a user can fix


def _show_error(message: str) -> None:
    Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


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
            if console.quiet:
                return
            Console(stderr=True).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        shown, warnings.showwarning = warnings.showwarning, show
        warnings.simplefilter("default", DataWarning)
        yield


def agree_on_options(context: typer.Context) -> None:
    """Raise a ValueError in all processes if they were started with different options."""
    from qtuning_fast.lifelong.processes import agree

    given = ((each.opts[0], context.params.get(each.name or "")) for each in context.command.params)
    agree({name: value if value is None else str(value) for name, value in given})


def silence_libraries() -> None:
    """Hide the progress bars and advice of libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
