"""Writes docs/performance.md, its pictures and the figures in README.md from the files in bench/results/.

    python -m qtuning_fast.bench.report.performance               after results have changed
    python -m qtuning_fast.bench.report.performance --check       says whether that was forgotten

Each folder of results is a device. Every figure comes from one of its files.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtuning_fast.bench import figures
from qtuning_fast.bench.report import page_tables
from qtuning_fast.bench.report.targets import AT_MOST, TARGETS, flatness, mixed
from qtuning_fast.bench.results import ROOT, changed_since, device_line

RESULTS, PAGE, IMAGES, README = "bench/results", "docs/performance.md", "docs/images/performance", "README.md"
BEGIN, END = ("<!-- figures: begin, written by make report -->", "<!-- figures: end -->")

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One section of the page, about one file of results."""

    question: str
    title: str
    text: str
    table: Callable[[Document], list[str]] | None = None
    drawn: bool = True  # whether `pictures` has one


INTRODUCTION = """\
# Performance

What do one layer and whole models cost, beside other ways to compute them? For one layer, the output and gradients of
every peer are compared with float64 before it is timed; for whole models, with ours. A wrong peer gets no time. Times
are medians of interleaved runs; on a GPU they are the GPU's own, by CUDA-graph replay, where both sides of a ratio have
them. Each section ends with its command; `bench/README.md` in the repository explains the method. To measure your own
model, run [`qtuning-fast bench`](recipes/benchmark.md).
"""
NO_GPU = """\
!!! warning "No figure has been measured on a GPU yet"
    The Triton kernels are tested in Triton's interpreter and compiled for sm_80, sm_89, sm_90, sm_100 and gfx942. Their
    speed is unknown. `make bench-gpu` measures it from a bare checkout within nine minutes.
"""
MODULES = {"decode": "rows.attention", "gpu_tests": "plans.gpu_tests"}  # of other questions: rows.QUESTION


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    options = parser.parse_args(arguments)
    devices = read(ROOT / RESULTS)
    pages = {PAGE: page(devices), README: with_figures((ROOT / README).read_text(), devices)}
    if options.check:
        stale = [name for name, text in pages.items() if (ROOT / name).read_text() != text]
        stale += [path for path, _, _ in pictures(devices) if not (ROOT / path).exists()]
        print("\n".join(f"{name} is not what the results say" for name in stale) or "all is as the results say")
        return 1 if stale else 0
    for name, text in pages.items():
        (ROOT / name).write_text(text)
        print(name)
    (ROOT / IMAGES).mkdir(parents=True, exist_ok=True)
    for path, draw, document in pictures(devices):
        draw(document).savefig(ROOT / path)
        print(path)
    return 0


def read(folder: Path) -> dict[str, dict[str, Document]]:
    """Documents by device's folder and by question; what was not written by a benchmark is left alone."""
    devices: dict[str, dict[str, Document]] = {}
    for path in sorted(folder.glob("*/*.json")):
        document = json.loads(path.read_text())
        if "question" in document:
            devices.setdefault(path.parent.name, {})[path.stem] = document
    return devices


def pictures(devices: Mapping[str, Mapping[str, Document]]) -> list[tuple[str, Callable[[Document], Any], Document]]:
    """Where each goes, what draws it, and from what."""
    from qtuning_fast.bench.report.pictures import PICTURES  # matplotlib, which no one else needs

    found = []
    for device, documents in devices.items():
        for question, draw in PICTURES.items():
            if documents.get(question, {}).get("entries"):
                found.append((_image(device, question), draw, documents[question]))
    return found


# The page


def page(devices: Mapping[str, Mapping[str, Document]]) -> str:
    kinds = {name: _kind(documents) for name, documents in devices.items()}
    parts = [INTRODUCTION]
    if "cuda" not in kinds.values():
        parts.append(NO_GPU)
    parts.append(targets(devices))
    for name, documents in devices.items():
        parts.append(f"## On {_device(documents)}\n")
        parts += [section(name, each, documents[each.question]) for each in SECTIONS if each.question in documents]
    return "\n".join(parts)


def section(device: str, each: Section, document: Document) -> str:
    lines = [f"### {each.title}", "", each.text.strip(), ""]
    if each.drawn:
        lines += [f"![{each.title}](images/performance/{device}-{each.question}.png)", ""]
    if each.table is not None:
        lines += [*each.table(document), ""]
    for name, reason in document["errors"].items():
        lines += [f"Not measured: {name}, {reason}.", ""]
    return "\n".join([*lines, source(document), ""])


def source(document: Document) -> str:
    """Which command, when, from which code; and whether that code has changed since."""
    changed = changed_since(document)
    since = f"**changed since: {', '.join(changed)}**" if changed else "kernels and backends have not changed since"
    commit = f"commit {document['commit']}" if document["commit"] else "no commit known"
    modified = ", with changes not committed" if document["modified"] else ""
    names = ("torch", "triton", "transformers", *(["peft"] if "peft" in document["command"] else []))
    versions = ", ".join(f"{name} {document['versions'][name]}" for name in names)
    threads = document["device"].get("threads") if document["device"]["type"] == "cpu" else None
    computing = "" if threads is None else f" ({threads} thread{'' if threads == 1 else 's'})"
    return (
        f"<small>`{_rerun(document)}`{computing}; {document['date']} UTC; {versions}; {commit}{modified}; {since}; "
        f"load before {document['load_before']}</small>"
    )


def targets(devices: Mapping[str, Mapping[str, Document]]) -> str:
    """The targets for each kind of device, and what was measured there."""
    lines = ["## Targets", "", "The bounds were set before anything was measured.", ""]
    by_kind = {_kind(documents): documents for documents in reversed(devices.values())}  # of several GPUs the first
    for kind, title in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        documents = by_kind.get(kind, {})
        lines += [f"### {title}", "", "| | bound | measured | |", "|---|---|---|---|"]
        for target in TARGETS:
            if target.device == kind:
                figure, sign = target.figure(documents), "≤" if target.relation == AT_MOST else "≥"
                beside = target.beside(documents)
                shown = "" if figure is None else f"{figure:.3f}" + (f" ({beside})" if beside else "")
                lines.append(f"| {target.of} | {sign} {target.bound:g} | {shown} | {target.verdict(documents)} |")
        lines.append("")
    return "\n".join(lines)


SECTIONS = (
    Section("tests", "Tests", "The tests that need a GPU.", page_tables.tests, drawn=False),
    Section(
        "attention",
        "Against peers",
        """
Forward and backward of one attention layer, with all its inputs trained. *Ours* is the backend that `auto` takes; the
times of the others are given over it. *Roofline* is the least time by counted work at the speeds measured on the
device, as a share of our time. *sdpa* is PyTorch's own attention with the reweighted prefix in front of every sample,
without a gate. *Attention alone* is the fastest of its backends with the prefix in place and nothing reweighted: the
lower bound. *Again* is ours a second time in the same run. On a GPU our block sizes are tuned on some of these shapes;
FlexAttention has its own defaults.
""",
        page_tables.attention,
    ),
    Section("decode", "Decoding", "One new token for each sequence; the prefix is stored once.", page_tables.decode),
    Section(
        "ingredients",
        "What each ingredient costs",
        "A step with gate, reweighting, a bank of prefixes and padding, compared with a step without one of them.",
        page_tables.ingredients,
    ),
    Section(
        "drop_in",
        "Windows and packed sequences",
        """
Texts of all lengths, packed or padded; and a window over a long text, beside as many scores without one. *sdpa* takes a
window as a mask of all scores.
""",
        page_tables.drop_in,
        drawn=False,
    ),
    Section(
        "busy",
        "On a busy machine",
        """
How many times as long a training step of one layer takes while other processes compute all the time.
""",
        page_tables.busy,
        drawn=False,
    ),
    Section("growth", "Growth", "The time over the length, the prefix, the batch, and the tasks in a mixed batch."),
    Section(
        "lifelong",
        "200 tasks in a row",
        """
A whole model learns one task after another: once with a queue of five prompts, once with prompts that only accumulate.
The anchor is the base model alone, timed beside each step; it separates a machine that slows down from a method that
does. Memory retention makes the queue's step slower once, at task 6. Where prompts accumulate, one adapter serves 200
tasks; the queue stores one adapter of constant size for each task.
""",
        page_tables.lifelong,
    ),
    Section(
        "models",
        "Whole models",
        """
Training steps of whole models on a task whose queue is full. `eager` and `flex` are the same model with attention
computed their way. `peft` is prefix tuning without gate, queue and network in front of the prefix; in T5 its prefix
sits in the decoder alone, as that of `qtuning_fast-decoder`. `frozen-base` trains an offset behind the lowest attention
and no prefix: the lower bound.
""",
        page_tables.models,
    ),
    Section(
        "peft",
        "Beside peft",
        """
Measured by `make bench-peft` in an environment of its own, because peft does not run on [every version of
transformers](peft.md).
""",
        page_tables.models,
        drawn=False,
    ),
    Section(
        "mixed_tasks",
        "Batches of several tasks",
        "A forward pass of a whole model over 64 samples: one task for all, several tasks shuffled, and task by task.",
        page_tables.mixed,
        drawn=False,
    ),
    Section(
        "task_inference",
        "Inferring the task",
        """
What it costs to find out which task an input is of, with the rule `closed-form`. Tasks have four classes of 16
examples, and 16 more a class of which up to 64 features are kept. *Fitting* happens once after a task came or went;
*scoring* takes a batch from its features to the names of its tasks. *Pass* is a forward pass of the base model over 16
samples of 128 tokens, which yields the features. *Recording* is that of one task, beside the passes over its examples.
Statistics and rule are in memory; statistics that a checkpoint holds need not stay there. In brackets what counted work
predicts at the speed of this machine. Features are random, and tasks have no prompts.
""",
        page_tables.task_inference,
        drawn=False,
    ),
)


# README


def with_figures(readme: str, devices: Mapping[str, Mapping[str, Document]]) -> str:
    """README with its figures between the two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{README} has no place for figures between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{headlines(devices)}\n{END}{after}"


def headlines(devices: Mapping[str, Mapping[str, Document]]) -> str:
    """The two pictures that matter most and what they say, of the fastest kind of device that was measured."""
    order = sorted(devices, key=lambda name: _kind(devices[name]) != "cuda")
    name = next((n for n in order if {"attention", "lifelong"} <= devices[n].keys()), None)
    if name is None:
        return "No figures yet: `make bench-cpu` or `make bench-gpu`."
    documents = devices[name]
    lines = [f"On {_device(documents)}:", ""]
    lines += [f"![Against peers]({_image(name, 'attention')})", "", _said_of_peers(documents["attention"]), ""]
    lines += [f"![200 tasks in a row]({_image(name, 'lifelong')})", "", _said_of_tasks(documents), ""]
    if _kind(documents) != "cuda":
        lines += [
            "**No figure has been measured on a GPU yet**; `make bench-gpu` measures them within nine minutes.",
            "",
        ]
    lines.append("All figures, their commands and the targets: [docs/performance.md](docs/performance.md).")
    return "\n".join(lines)


def _said_of_peers(document: Document) -> str:
    over_eager, over_sdpa = [], []
    for entry in document["entries"].values():
        rows, ours = entry["rows"], figures.auto(entry, "step")
        if ours and not entry["shape"].get("window"):  # others compute what a window hides
            over_eager.append(figures.ratio(rows.get("eager"), rows[ours], "step"))
            over_sdpa.append(figures.ratio(rows.get("sdpa"), rows[ours], "step"))
    eager, sdpa = ([x for x in each if x] for each in (over_eager, over_sdpa))
    spans = f"{min(eager):.2f} to {max(eager):.1f}", f"{min(sdpa):.2f} to {max(sdpa):.2f}"
    return (
        f"A training step of one layer, over {len(eager)} shapes without a window: eager PyTorch takes {spans[0]} "
        "times our time, more the longer the context is; PyTorch's own attention on the concatenated prefix, without a "
        f"gate, takes {spans[1]} times our time. (B batch, H heads, N context, D head size, P prefix.)"
    )


def _said_of_tasks(documents: Mapping[str, Document]) -> str:
    changes = [
        f"{name} changed by {value - 1:+.1%}"
        for name, figure in (("the time of a step", "step_ms"), ("memory", "resident_bytes"))
        if (value := flatness(figure, documents))
    ]
    tasks = len(documents["lifelong"]["entries"]["queue"]["per_task"])
    said = f"Between tasks 6-15 and tasks {tasks - 9}-{tasks}, {' and '.join(changes)}." if changes else ""
    several = mixed(documents)
    mixing = f" A batch that mixes sixteen tasks takes {several:.2f} times as long as a batch of one task."
    return f"{said}{mixing}" if several else said


# Pieces


def _image(device: str, question: str) -> str:
    return f"{IMAGES}/{device}-{question}.png"


def _kind(documents: Mapping[str, Document]) -> str:
    return next(iter(documents.values()))["device"]["type"]


def _device(documents: Mapping[str, Document]) -> str:
    return device_line(next(iter(documents.values()))["device"])


def _rerun(document: Document) -> str:
    """The command that measures a document again, without the place of its results; modules may have moved since."""
    words = document["command"].split()[3:]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    question = document["question"]
    if question == "decode" and "--decode" not in words:  # its command was of another form once
        words = ["--decode", *words]
    return " ".join([f"python -m qtuning_fast.bench.{MODULES.get(question, f'rows.{question}')}", *words])


if __name__ == "__main__":
    sys.exit(main())
