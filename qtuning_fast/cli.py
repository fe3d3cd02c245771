"""The command line: `qtuning-fast run | eval | predict | statistics | report | push | pull | bench | serve | info`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.table import Table
except ImportError as error:  # the operator alone does not need these packages
    sys.exit(f"qtuning-fast needs {error.name}: pip install 'qtuning_fast[lifelong]'")

from qtuning_fast.cli_console import agree_on_options, console, readable_errors, silence_libraries
from qtuning_fast.cli_hub import pull, push
from qtuning_fast.cli_options import Options, with_options
from qtuning_fast.lifelong.methods import METHODS, Q_TUNING, method_by_name
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.stream import DINOV2, MINILM
from qtuning_fast.lifelong.streams import STREAMS, defaults_in_words
from qtuning_fast.method.config import QTuningConfig
from qtuning_fast.method.task_rules import RULES, ClosedForm
from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.version import __version__

if TYPE_CHECKING:
    from qtuning_fast.lifelong.saved_run import SavedRun

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _option(panel: str, text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel)


_data, _method, _which, _sizes = (partial(_option, panel) for panel in ("Data", "Method", "Attention", "Sizes"))

Rule = Annotated[
    str | None, typer.Option("--task-rule", help=f"How a task is inferred: {', '.join(RULES)}; default as in the run.")
]
TopK = Annotated[int, typer.Option(min=1, help="Without --task: ask the adapters of so many tasks, the likeliest.")]
AnswersBy = Annotated[
    str | None,
    typer.Option(help="What answers without --task: adapters, joint-head or rule; default that of the run's method."),
]
RunFolder = Annotated[Path, typer.Option("--run", help="Folder of a run.")]


def main() -> None:
    """Run the command line; the entry point of the console script and of `python -m qtuning_fast`."""
    app()


def _version(asked: bool) -> None:
    if asked:
        console.print(f"qtuning_fast {__version__}", highlight=False)
        raise typer.Exit


_WITHOUT_STREAM = {name: getattr(QTuningConfig(), name) for name in ("queue_size", "task_type")}

_DATA = Options(DataOptions, "Data", left_out=("seed",))
_METHOD = Options(
    QTuningConfig, "Method", defaults={n: defaults_in_words(n, own) for n, own in _WITHOUT_STREAM.items()}
)
_TRAINING = Options(TrainingOptions, "Training of each task", left_out=("seed", "eval_batch_size"))
_SERVING = Options(ServingOptions, "Serving")


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Learn one task after another with a bounded queue of prompts inside attention."""


@app.command()
@with_options(_DATA, _METHOD, _TRAINING)
def run(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run there resumes.")],
    method: Annotated[
        str,
        _method(f"{', '.join(METHODS)}: each sets options below. Those that you give take precedence."),
    ] = Q_TUNING,
    model: Annotated[
        str | None, _data(f"Base model: a folder or a hub name; default {MINILM}, for images {DINOV2}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed, also for the draw of examples.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; the report gives mean and spread.")] = 1,
    forward_transfer: Annotated[bool, typer.Option("--forward-transfer", help="Also learn each task alone.")] = False,
    task_rule: Annotated[
        str | None,
        typer.Option(help=f"How the task of an input is inferred: {', '.join(RULES)}; default {ClosedForm.name}."),
    ] = None,
    keep_features: Annotated[
        bool, typer.Option("--keep-features/--no-keep-features", help="Keep validation features, for calibration.")
    ] = True,
    **given: Any,
) -> None:
    """Run a stream of tasks and a linear probe on the same examples; write metrics and a report."""
    with readable_errors():
        agree_on_options(context)
        silence_libraries()
        from qtuning_fast.lifelong.runs import RunSettings, run_seeds, run_stream

        for name, value in _WITHOUT_STREAM.items():
            if given[name] is None:
                given[name] = getattr(STREAMS.get(given["stream"]), name, value)
        data = _DATA.read(given, seed=seed)
        named = method_by_name(method).without(_typed(context))
        config = _METHOD.read(given, **named.config)
        training = _TRAINING.read(given, seed=seed, **named.training)
        if model is None:
            model = DINOV2 if config.task_type == "image-classification" else MINILM
        rule = task_rule or named.rule or ClosedForm.name
        settings = RunSettings(model, data, config, training, forward_transfer, rule, keep_features, method)
        from qtuning_fast.lifelong.progress import ProgressBars
        from qtuning_fast.lifelong.report.console import run_tables, seeds_tables

        def progress_bars(tasks: Any, title: str) -> ProgressBars:
            return ProgressBars(len(tasks), title, console)

        if seeds == 1:
            console.print(run_tables(run_stream(settings, out, progress_bars)))
        else:
            console.print(seeds_tables(run_seeds(settings, seeds, out, progress_bars)))
        console.print(f"Report: {out / 'report.html'}", soft_wrap=True, markup=False)


def _typed(context: typer.Context) -> set[str]:
    """The parameters that are on the command line, whether or not with their default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    folder: RunFolder,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    data: Annotated[str | None, typer.Option(help="Your own labelled examples instead of the test split.")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the texts in --data; default as in the run.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels in --data; default as in the run.")
    ] = None,
    top_k: TopK = 1,
    rule: Rule = None,
    answers_by: AnswersBy = None,
) -> None:
    """Evaluate the stored adapters on the run's test splits or on your own labelled examples.

    Without --task, the task of an example is inferred; your own examples then count by the names of their labels.
    """
    with readable_errors():
        agree_on_options(context)
        _check_inferring(task, top_k, rule, answers_by)
        if data is None and (text_column or label_column):
            raise ValueError("--text-column and --label-column need --data; the run knows the columns of its own tasks")
        silence_libraries()
        from qtuning_fast.lifelong.data.loading import load_examples
        from qtuning_fast.lifelong.report.console import labels_table, scores_table
        from qtuning_fast.lifelong.saved_run import SavedRun

        saved = SavedRun(folder, task_rule=rule, answers_by=answers_by)
        columns = {
            "text_column": text_column or saved.data.text_column,
            "label_column": label_column or saved.data.label_column,
        }
        if data is not None and task is None:
            examples = load_examples(data, saved.label_names, **columns)
            console.print(labels_table(len(examples), saved.score_by_label(examples, top_k=top_k)))
            _name_left_out(saved)
            return
        if data is not None and task is not None:
            kind = saved.model.problem_type(task)
            tests = {task: load_examples(data, saved.model.label_names(task), **columns, problem_type=kind)}
        else:
            tests = {each.name: each.test for each in saved.load_tasks()}
            if task is not None:
                saved.model.label_names(task)  # refuses an unknown task
                tests = {task: tests[task]}
        unnamed = task is None and saved.infers
        rows = [
            {
                "task": name,
                "examples": len(examples),
                "measure": saved.metric(name),
                "score": saved.score(examples, name),
            }
            | (saved.score_unnamed(examples, name, top_k=top_k) if unnamed else {})
            for name, examples in tests.items()
        ]
        console.print(scores_table(rows))
        if task is None:
            console.print(
                "not named: nobody says which task an example is of; task and class must be right.\n"
                "known: the share that is not said to be of no known task."
                if unnamed
                else saved.no_inference,
                markup=False,
                highlight=False,
            )
            _name_left_out(saved)


@app.command()
def predict(
    folder: RunFolder,
    text: Annotated[list[str], typer.Argument(help="Texts to classify, or paths of images.")],
    task: Annotated[str | None, typer.Option(help="Their task; without it, it is inferred.")] = None,
    top_k: TopK = 1,
    rule: Rule = None,
    answers_by: AnswersBy = None,
) -> None:
    """Classify texts or images, under a stored task or under the one that each seems to be of."""
    with readable_errors(alone="predict"):
        _check_inferring(task, top_k, rule, answers_by)
        if not all(each.strip() for each in text):
            raise ValueError("text is empty; give a text to classify")
        silence_libraries()
        from qtuning_fast.lifelong.saved_run import SavedRun

        saved = SavedRun(folder, task_rule=rule, answers_by=answers_by)
        if task is not None:
            answers = [f"{task}: {saved.answer(found, task)}" for found in saved.predict(text, task)]
        else:
            answers = [saved.in_words(found) for found in saved.infer(text, top_k=top_k)]
        for each, answer in zip(text, answers):
            console.print(each, style="bold", markup=False, highlight=False)
            console.print(f"  {answer}", markup=False, highlight=False)
        if task is None:
            _name_left_out(saved)


def _check_inferring(task: str | None, top_k: int, rule: str | None, answers_by: str | None) -> None:
    """Raise a ValueError if options that infer a task stand beside its name."""
    if task is not None and (top_k != 1 or rule is not None or answers_by is not None):
        raise ValueError(
            "--top-k, --task-rule and --answers-by are for a task that is inferred, but --task names it; leave --task "
            "out, or them"
        )


def _name_left_out(saved: SavedRun) -> None:
    """Say which tasks cannot be inferred."""
    if saved.infers and saved.left_out:
        console.print(
            f"Not considered, because they have no statistics: {', '.join(saved.left_out)}. Record them: "
            f"{saved.statistics_command}",
            markup=False,
            highlight=False,
        )


@app.command()
def statistics(folder: RunFolder, rule: Rule = None) -> None:
    """Record what inferring the task needs, for a run of an earlier version, from the run's own examples."""
    with readable_errors(alone="statistics"):
        silence_libraries()
        from qtuning_fast.lifelong.saved_run import SavedRun

        recorded = SavedRun(folder, task_rule=rule).record_statistics()
        said = f"Recorded for {', '.join(recorded)}." if recorded else "Every task has its statistics already."
        console.print(said, markup=False, highlight=False)


@app.command()
def report(folder: RunFolder) -> None:
    """Rewrite a run's report and pictures from its metrics."""
    with readable_errors(alone="report"):
        from qtuning_fast.lifelong.report.console import run_tables, seeds_tables
        from qtuning_fast.lifelong.runs import rewrite_report

        page, metrics, is_summary = rewrite_report(folder)
        console.print(seeds_tables(metrics) if is_summary else run_tables(metrics))
        console.print(f"Report: {page}", soft_wrap=True, markup=False)


app.command()(push)
app.command()(pull)


@app.command()
def bench(
    model: Annotated[str | None, _which("A folder or a hub name: its heads; default all-MiniLM-L6-v2.")] = None,
    shape: Annotated[str | None, _which("A measured shape, such as bert-base-512-cpu or llama-8b.")] = None,
    heads: Annotated[int | None, _which("Query heads, instead of a model.")] = None,
    kv_heads: Annotated[int | None, _which("Key and value heads; default: as many as query heads.")] = None,
    head_size: Annotated[int | None, _which("Size of a head.")] = None,
    batch: Annotated[int | None, _sizes("Sequences; default 16.")] = None,
    tokens: Annotated[int | None, _sizes("Tokens of a sequence; default 128.")] = None,
    context: Annotated[int | None, _sizes("Keys; default: as many as tokens, 1024 with --decode.")] = None,
    prefix_rows: Annotated[int | None, _sizes("Rows of a prefix; default: those of a full queue.")] = None,
    tasks: Annotated[int | None, _sizes("Tasks in one batch, each with its prefix; default 1.")] = None,
    padding: Annotated[float | None, _sizes("Share of the context that is padding, 0 to 0.5; default 0.")] = None,
    causal: Annotated[bool | None, _sizes("Causal attention; default: as in the model.")] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="One new token: forward only, over a cache.", rich_help_panel="Sizes")
    ] = False,
    dtype: Annotated[str, _sizes("auto, float32, bfloat16, float16 or float64.")] = "auto",
    peer: Annotated[list[str] | None, typer.Option(help="A peer to measure beside auto's backend; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for all figures.")] = None,
) -> None:
    """Measure what attention with a prefix costs a model on this machine, beside other implementations."""
    with readable_errors("Nothing is kept.", alone="bench"):
        silence_libraries()
        from qtuning_fast.bench.console import LEGEND, Bars, peers_table, times_table, verdict
        from qtuning_fast.bench.layer_cost import LayerCase, LayerOptions, results_file
        from qtuning_fast.bench.measure import QUICK, TURNS

        sizes = (batch, tokens, context, prefix_rows, tasks, padding, causal, decode)
        case = LayerCase.of(LayerOptions(model, shape, heads, kv_heads, head_size, *sizes), dtype, peer or ())
        results = results_file(out, case, sys.argv[1:]) if out is not None else None
        console.print(case.heading(), markup=False, highlight=False)
        with Bars(console) as bars:
            entry = case.measure(QUICK if quick else TURNS, bars)
        if results is not None:
            results.add(case.shape.name, entry)
        console.print(times_table(entry), LEGEND, peers_table(entry), highlight=False)
        console.print(f"\nauto takes {case.choice}\n\n{verdict(entry)}", markup=False, highlight=False)


@app.command()
@with_options(_SERVING)
def serve(folder: RunFolder, **given: Any) -> None:
    """Serve a run over HTTP: batches that mix tasks, adapters that come and go. Ctrl-C and SIGTERM drain."""
    with readable_errors("Nothing is kept.", alone="serve"):
        silence_libraries()
        from qtuning_fast.serving.command import run_server

        run_server(folder, _SERVING.read(given), partial(console.print, markup=False, highlight=False, soft_wrap=True))


@app.command()
def info() -> None:
    """Show versions, devices, backends, and what is missing."""
    with readable_errors(alone="info"):
        from qtuning_fast.lifelong.environment import describe_environment

        for title, rows in describe_environment().items():
            table = Table(title=title, title_justify="left", show_header=False)
            for row in rows:
                table.add_row(*row)
            console.print(table)
