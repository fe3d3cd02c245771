"""The command line: `qtuning-fast run | eval | predict | report | bench | info`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:  # the operator alone does not need them
    sys.exit(f"qtuning-fast needs {error.name}: pip install 'qtuning_fast[lifelong]'")

from qtuning_fast.attention.common import GATES
from qtuning_fast.lifelong.options import TrainingOptions
from qtuning_fast.method.config import TASK_TYPES, QTuningConfig
from qtuning_fast.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class _Output(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True  # whoever read along has left; the run goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Output()

_METHOD = QTuningConfig()
_TRAINING = TrainingOptions()


def _option(panel: str, text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel)


_data, _method, _training = (partial(_option, panel) for panel in ("Data", "Method", "Training of each task"))
_which, _sizes = (partial(_option, panel) for panel in ("Whose attention", "What of it"))

RunFolder = Annotated[Path, typer.Option("--run", help="Folder of a run.")]


def main() -> None:
    """The console script."""
    app()


@contextmanager
def _clear_errors(
    interrupted: str = "What is finished is kept: the same command goes on from here.",
) -> Iterator[None]:
    """What a user can mend ends in one line and exit code 2; Ctrl-C says how to go on."""
    try:
        with _notes():
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
def _notes() -> Iterator[None]:
    """What the data makes one warn of is a line, without the place in the code."""
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


def _quiet() -> None:
    """Libraries' progress and advice stay out of the way of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import transformers

    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _version(asked: bool) -> None:
    if asked:
        console.print(f"qtuning_fast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Learn one task after another with a bounded queue of prompts inside attention."""


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run; a run cut off there goes on.")],
    stream: Annotated[str | None, _data("A stream of tasks: offline-5 or offline-15.")] = None,
    task: Annotated[
        list[str] | None,
        _data("Your own task, name=path or path: CSV, TSV, JSONL, Parquet, a folder, images, a hub dataset. Repeat."),
    ] = None,
    text_column: Annotated[str, _data("Column of the texts in your own data.")] = "text",
    label_column: Annotated[str, _data("Column of the labels in your own data.")] = "label",
    model: Annotated[str, _data("Base model: a folder or a hub name.")] = "all-MiniLM-L6-v2",
    shots: Annotated[int | None, _data("Training examples a class; default 16, of your own data all.")] = None,
    validation_shots: Annotated[int, _data("Validation examples a class.")] = 16,
    test_size: Annotated[int, _data("Test examples a task at most.")] = 200,
    seed: Annotated[int, typer.Option(help="Random seed, of the draw of examples too.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Run from so many seeds and report mean and spread.")] = 1,
    forward_transfer: Annotated[bool, typer.Option("--forward-transfer", help="Learn each task alone, too.")] = False,
    task_type: Annotated[str, _method(f"{', '.join(TASK_TYPES)}.")] = _METHOD.task_type,
    prompt_length: Annotated[int, _method("Rows of a task's prompt.")] = _METHOD.prompt_length,
    queue_size: Annotated[int | None, _method("Capacity in prompts; default 5, for offline-5 3.")] = None,
    shared_length: Annotated[int, _method("Rows of the shared prompt.")] = _METHOD.shared_length,
    rank: Annotated[int, _method("Rank of the reweighting.")] = _METHOD.rank,
    gate: Annotated[str, _method(f"{', '.join(GATES)} or none.")] = _METHOD.gate or "none",
    gate_per: Annotated[str, _method("layer or head.")] = _METHOD.gate_per,
    gate_training: Annotated[str, _method("every-task or first-task.")] = _METHOD.gate_training,
    placement: Annotated[str, _method("prefix, in each layer; or input, in front of it.")] = _METHOD.placement,
    stack: Annotated[str, _method("Of an encoder-decoder: encoder, decoder or both.")] = _METHOD.stack,
    layers: Annotated[str | None, _method("Layers with a prefix, such as 0,1,2; default all.")] = None,
    reparameterization: Annotated[str, _method("mlp or none.")] = _METHOD.reparameterization or "none",
    eviction: Annotated[str, _method("pca, fifo or random.")] = _METHOD.eviction,
    retention_weight: Annotated[float, _method("Weight of memory retention; 0: off.")] = _METHOD.retention_weight,
    steps: Annotated[int, _training("Steps a task at most.")] = _TRAINING.steps,
    batch_size: Annotated[int, _training("Examples a step.")] = _TRAINING.batch_size,
    max_length: Annotated[int, _training("Tokens a text is cut or padded to.")] = _TRAINING.max_length,
    prompt_rate: Annotated[float, _training("Learning rate of prompts and reweighting.")] = _TRAINING.prompt_rate,
    head_rate: Annotated[float, _training("Learning rate of heads.")] = _TRAINING.head_rate,
    gate_rate: Annotated[float, _training("Learning rate of the gate.")] = _TRAINING.gate_rate,
    network_rate: Annotated[float, _training("Learning rate of the reparametrisation.")] = _TRAINING.network_rate,
    eval_every: Annotated[int, _training("Steps between looks at the validation split.")] = _TRAINING.eval_every,
    patience: Annotated[int, _training("Looks without a gain before a task stops; 0: never.")] = _TRAINING.patience,
) -> None:
    """Run a stream of tasks, beside a linear probe on the same examples; write metrics and a report."""
    with _clear_errors():
        _quiet()
        from qtuning_fast.lifelong.runs import DataOptions, RunSettings, execute, execute_seeds
        from qtuning_fast.lifelong.streams import STREAMS

        if queue_size is None:
            queue_size = STREAMS[stream].queue_size if stream in STREAMS else _METHOD.queue_size
        settings = RunSettings(
            model=model,
            data=DataOptions(
                stream, tuple(task or ()), shots, validation_shots, test_size, seed, text_column, label_column
            ),
            method=QTuningConfig(
                prompt_length=prompt_length,
                queue_size=queue_size,
                shared_length=shared_length,
                rank=rank,
                gate=_or_none(gate),
                gate_per=gate_per,
                gate_training=gate_training,
                placement=placement,
                stack=stack,
                layers=_indices(layers),
                reparameterization=_or_none(reparameterization),
                eviction=eviction,
                retention_weight=retention_weight,
                task_type=task_type,
            ),
            training=TrainingOptions(
                steps=steps,
                batch_size=batch_size,
                max_length=max_length,
                prompt_rate=prompt_rate,
                head_rate=head_rate,
                gate_rate=gate_rate,
                network_rate=network_rate,
                eval_every=eval_every,
                patience=patience,
                seed=seed,
            ),
            forward_transfer=forward_transfer,
        )
        from qtuning_fast.lifelong.progress import ProgressBars
        from qtuning_fast.lifelong.report.console import seeds_table, summary_table

        def listening(tasks: Any, title: str) -> ProgressBars:
            return ProgressBars(len(tasks), title, console)

        if seeds == 1:
            console.print(summary_table(execute(settings, out, listening)))
        else:
            console.print(seeds_table(execute_seeds(settings, seeds, out, listening)))
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True, markup=False)


@app.command(name="eval")
def evaluate(
    folder: RunFolder,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    data: Annotated[str | None, typer.Option(help="Labelled examples of your own instead of the test split.")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the texts in --data; default as in the run.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels in --data; default as in the run.")
    ] = None,
) -> None:
    """Evaluate the stored adapters, on the run's test splits or on labelled examples of your own."""
    with _clear_errors():
        if data is not None and task is None:
            raise ValueError("--data needs --task, to say which adapter")
        if data is None and (text_column or label_column):
            raise ValueError("--text-column and --label-column need --data; the run knows those of its own tasks")
        _quiet()
        from qtuning_fast.lifelong.data.loading import load_examples
        from qtuning_fast.lifelong.runs import OpenRun

        opened = OpenRun(folder)
        if data is not None and task is not None:
            columns = {
                "text_column": text_column or opened.data.text_column,
                "label_column": label_column or opened.data.label_column,
            }
            tests = {task: load_examples(data, opened.model.label_names(task), **columns)}
        else:
            tests = {each.name: each.test for each in opened.load_tasks()}
            if task is not None:
                opened.model.label_names(task)  # an unknown task is an error here
                tests = {task: tests[task]}
        table = Table("task", "examples", "accuracy")
        for name, examples in tests.items():
            table.add_row(Text(name), str(len(examples)), f"{opened.accuracy(examples, name):.3f}")
        console.print(table)


@app.command()
def predict(
    folder: RunFolder,
    text: Annotated[list[str], typer.Argument(help="Texts to classify, or paths of images.")],
    task: Annotated[str | None, typer.Option(help="The task they belong to; all tasks answer without it.")] = None,
) -> None:
    """Classify texts or images under a stored task."""
    with _clear_errors():
        if not all(each.strip() for each in text):
            raise ValueError("text is empty; there is nothing to classify")
        _quiet()
        from qtuning_fast.lifelong.runs import OpenRun

        opened = OpenRun(folder)
        names = [task] if task is not None else opened.model.tasks
        answers = {name: opened.predict(text, name).max(-1) for name in names}
        for row, each in enumerate(text):
            console.print(each, style="bold", markup=False, highlight=False)
            for name, (confidence, label) in answers.items():
                answer = opened.model.label_names(name)[int(label[row])]
                console.print(f"  {name}: {answer} ({float(confidence[row]):.0%})", markup=False, highlight=False)
        if task is None:
            console.print(
                "A guess by every task: which task a text belongs to is not known, and confidences of different tasks "
                "do not compare. Name it with --task."
            )


@app.command()
def report(folder: RunFolder) -> None:
    """Write a run's report and pictures again, from its metrics."""
    with _clear_errors():
        from qtuning_fast.lifelong.report.console import seeds_table, summary_table
        from qtuning_fast.lifelong.runs import rewrite_report

        page, metrics, is_summary = rewrite_report(folder)
        console.print(seeds_table(metrics) if is_summary else summary_table(metrics))
        console.print(f"Report: {page}", soft_wrap=True, markup=False)


@app.command()
def bench(
    model: Annotated[str | None, _which("A folder or a hub name: its heads; default all-MiniLM-L6-v2.")] = None,
    shape: Annotated[str | None, _which("A measured shape, such as bert-base-512-cpu or llama-8b.")] = None,
    heads: Annotated[int | None, _which("Query heads, instead of a model.")] = None,
    kv_heads: Annotated[int | None, _which("Key and value heads; default as many.")] = None,
    head_size: Annotated[int | None, _which("Of one head.")] = None,
    batch: Annotated[int | None, _sizes("Sequences; default 16.")] = None,
    tokens: Annotated[int | None, _sizes("Of a sequence; default 128.")] = None,
    context: Annotated[int | None, _sizes("Keys; default as many as tokens, 1024 with --decode.")] = None,
    prefix_rows: Annotated[int | None, _sizes("Rows of a prefix; default as many as a full queue has.")] = None,
    tasks: Annotated[int | None, _sizes("Tasks in one batch, each with its prefix; default 1.")] = None,
    padding: Annotated[float | None, _sizes("Share of the context that is padding, 0 to 0.5; default 0.")] = None,
    causal: Annotated[bool | None, _sizes("Tokens see no later ones; default as in the model.")] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="One new token: forward only, over a cache.", rich_help_panel="What of it")
    ] = False,
    dtype: Annotated[str, _sizes("auto, float32, bfloat16, float16 or float64.")] = "auto",
    peer: Annotated[list[str] | None, typer.Option(help="Whom to measure beside what auto takes. Repeat.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
) -> None:
    """What attention with a prompt costs a model on this machine, beside other ways to compute it."""
    with _clear_errors("Nothing is kept."):
        _quiet()
        from qtuning_fast.bench.console import LEGEND, Bars, peers_table, times_table, verdict
        from qtuning_fast.bench.layer_cost import Question, Wanted, results_file
        from qtuning_fast.bench.measure import QUICK, TURNS

        sizes = (batch, tokens, context, prefix_rows, tasks, padding, causal, decode)
        question = Question.of(Wanted(model, shape, heads, kv_heads, head_size, *sizes), dtype, peer or ())
        results = results_file(out, question, sys.argv[1:]) if out is not None else None
        console.print(question.heading(), markup=False, highlight=False)
        with Bars(console) as bars:
            entry = question.measure(QUICK if quick else TURNS, bars)
        if results is not None:
            results.add(question.shape.name, entry)
        console.print(times_table(entry), LEGEND, peers_table(entry), highlight=False)
        console.print(f"\nauto takes {question.choice}\n\n{verdict(entry)}", markup=False, highlight=False)


@app.command()
def info() -> None:
    """Versions, devices, backends, and what is missing."""
    with _clear_errors():
        from qtuning_fast.lifelong.environment import describe

        for title, rows in describe().items():
            table = Table(title=title, title_justify="left", show_header=False)
            for row in rows:
                table.add_row(*row)
            console.print(table)


def _or_none(value: str) -> str | None:
    return None if value == "none" else value


def _indices(layers: str | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    try:
        return tuple(int(index) for index in layers.split(","))
    except ValueError:
        raise ValueError(f"layers is {layers!r}; it must be indices such as 0,1,2") from None
