"""Write docs/learning.md, its pictures and README's figures from the study's files, whole or as far as they go.

python -m qtuning_fast.bench.learning.report
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from qtuning_fast.bench.learning.answers import Found, answers
from qtuning_fast.bench.learning.arms import (
    CORE,
    FASTER,
    FIRST,
    LINEAR,
    MIXED,
    PARTS,
    PEERS,
    PLACES,
    START,
    START_MIXED,
)
from qtuning_fast.bench.learning.linear import ALL_EXAMPLES, CLASSIFIERS
from qtuning_fast.bench.learning.run import OUT
from qtuning_fast.bench.learning.summary import BASE, CONFIDENCE, Estimate, Results, difference, points, read
from qtuning_fast.lifelong.metrics import START_ROWS
from qtuning_fast.lifelong.report.plot_style import INK, PALETTE, new_figure

PAGE = Path("docs/learning.md")
README = Path("README.md")
BEGIN, END = "<!-- learning: begin, written by bench.learning.report -->\n", "<!-- learning: end -->\n"
IMAGES = Path("docs/images")

CONTROL = "random rows in the queue"
INGREDIENTS = {
    "no queue": "queue of several prompts",
    CONTROL: "what is in the queue",
    "no reweighting": "reweighting W",
    "no gate": "gate",
    "no shared prompt": "shared prompt, with retention",
    "no retention": "memory retention",
    "fifo": "PCA, not first in first out",
    "random eviction": "PCA, not a random prompt",
    "no queue, no shared prompt": "queue and shared prompt",
    "no reweighting, no gate": "reweighting and gate",
}
WORTH = (
    "`start` less `start` without the ingredient, in points: the ingredient helps if this is above 0, of forgetting "
    "below 0. If none of them were worth anything, one interval in twenty would still exclude 0."
)

STREAM_WORDS = {
    "related": ("Related tasks", "Reviews of films, reviews of products, tweets, editorials, tweets to airlines."),
    "halves": ("Halves of one task", "Two tasks with the same four newsgroups and different texts."),
    "unrelated": ("Unrelated tasks", "Kinds of questions, spam, readers of books."),
    "offline-15": ("Fifteen tasks", "The [packaged stream](data.md) of that name, of related and unrelated tasks."),
}
LEGEND = """\
- `start, head mixed`: the defaults. Prompts and heads [start from what suits the task](method.md#where-a-task-starts);
  after training, heads are joined by the closed form of training and validation examples.
- `start`: the defaults, but heads stay as training leaves them, as in all arms below.
- `from-random`: both start at random. `closed-form-head`: prompts at random, heads in closed form.
- *faster network*: the reparametrisation learns at 1e-3, which suits random starts better, instead of 3e-4.
- `prompt-per-task`, `progressive-prompts`, `one-prompt`: [peers](recipes/lifelong.md#peers-and-ablations).
- *linear*: no prompts, classifiers of the frozen model's features. *Probe*: a tuned logistic regression. *Closed form*:
  the Gaussian classifier; *of all*: from training and validation examples. *Donor*: the best earlier probe, as it is.
  *Transferred*: a regression pulled towards earlier probes, tuned.
- *adapters*: each task under its own. *Live queue*: all heads under the prefix that is live after the last task.
- *steps to 95%* of the validation accuracy that `from-random` ends with."""


def accuracy(values: dict[int, float]) -> str:
    return f"{Estimate.of(list(values.values())).mean:.3f}" if values else "–"


def markdown_table(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, its columns by name."""
    columns = head.split("|")
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def table(results: Results) -> list[str]:
    """Each arm's accuracy, its differences to random starts and to the tuned probe, its steps and its live queue."""
    rows = []
    base, probe = results.scores(BASE), results.scores("probe")
    for arm in of_methods(results):
        ours, steps = results.scores(arm), results.steps(arm)
        cells = [f"`{arm}`", str(len(ours)), accuracy(ours)]
        cells += ["" if arm == BASE else points(difference(ours, base)), points(difference(ours, probe))]
        cells += [
            f"{Estimate.of(list(steps.values())).mean:.0f}" if steps else "–",
            accuracy(results.scores(arm, "live_queue")),
        ]
        rows.append(cells)
    for name in CLASSIFIERS:
        ours = results.scores(name)
        if ours:
            cells = [f"linear: {name.replace('_', ' ')}", str(len(ours)), accuracy(ours)]
            cells += [
                points(difference(ours, base)),
                "" if name == "probe" else points(difference(ours, probe)),
                "",
                "",
            ]
            rows.append(cells)
    return markdown_table("arm|draws|adapters|against `from-random`|against the probe|steps to 95%|live queue", rows)


def of_methods(results: Results) -> list[str]:
    """The arms that are whole methods, in the order of their declaration."""
    return [arm for arm in (*CORE, *FASTER, *MIXED, *PEERS) if arm in results.arms and arm != CONTROL]


def ingredients(results: Results) -> list[str]:
    """What each ingredient is worth: `start` less `start` without it."""
    rows = []
    for arm, worth in INGREDIENTS.items():
        if arm in results.arms:
            measures = (results.scores, partial(results.scores, evaluation="live_queue"), results.forgetting)
            found = [difference(of(START), of(arm)) for of in measures]
            draws = found[0].draws if found[0] else 0
            rows.append([worth, f"`{arm}`", str(draws), *map(points, found)])
    return markdown_table("ingredient|arm without it|draws|adapters|live queue|forgetting of the live queue", rows)


def places(results: Results) -> list[str]:
    """Prompts elsewhere, or more of them, less `start`."""
    rows = []
    for arm in PLACES:
        ours = results.scores(arm)
        if ours:
            theirs, live = results.scores(START), results.scores(arm, "live_queue")
            cells = [accuracy(ours), points(difference(ours, theirs))]
            cells.append(points(difference(live, results.scores(START, "live_queue"))))
            rows.append([f"`{arm}`", str(len(ours)), *cells])
    return markdown_table("arm|draws|adapters|against `start`|live queue, against `start`", rows)


def picture(results: Results, title: str) -> Figure:
    """The differences to random starts in points, with their intervals."""
    base = results.scores(BASE)
    names = [*(arm for arm in of_methods(results) if arm != BASE), *CLASSIFIERS]
    found = {name: difference(results.scores(name), base) for name in names}
    drawn = {name: each for name, each in found.items() if each is not None}
    figure, [axes] = new_figure(title, height=1.2 + 0.28 * len(drawn))
    for row, (name, each) in enumerate(drawn.items()):
        color = PALETTE["task_adapter" if name not in CLASSIFIERS else "linear_probe"]
        width = 100 * (each.half_width or 0)
        axes.errorbar(100 * each.mean, row, xerr=width, fmt="o", color=color, capsize=3, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(drawn)), [name.replace("_", " ") for name in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel("points above a random start, with 95% intervals")
    return figure


def starts(results: Results) -> str:
    """How often tasks after the first started from what."""
    chosen = [task["start"]["chosen"] for record in results.records(START) for task in record["per_task"][1:]]
    counts = Counter(START_ROWS[each["rows"]] + ", heads mixed" * bool(each["mixed_with"]) for each in chosen)
    shares = "; ".join(f"{count} from {kind}" for kind, count in counts.most_common())
    return f"Where the {len(chosen)} tasks after the first started: {shares}."


def against_controls(results: Results) -> str:
    """What is left of the lead of `start` when random starts have the rate that suits them."""
    ours = results.scores(START)
    found = [
        f"{points(difference(ours, results.scores(arm)))} against `{arm}`" for arm in FASTER if arm in results.arms
    ]
    return f"`start`, in points: {'; '.join(found)}."


def against_all_examples(results: Results) -> str:
    """What is left of the lead of mixed heads over a linear classifier that learns from validation examples, too."""
    lead = difference(results.scores(START_MIXED), results.scores(ALL_EXAMPLES))
    than = "the closed form of all, which has seen as many examples"
    return f"`{START_MIXED}`, in points: {points(lead)} against {than}."


def in_short(found: Found) -> list[str]:
    """What the defaults gain in all, and which ingredients are shown to help or to harm."""
    said = []
    for words, other in (("random starts", BASE), ("the tuned probe", "probe")):
        leads = []
        for (stream, shots), results in found.items():
            lead = difference(results.scores(START_MIXED), results.scores(other))
            if lead is not None:
                leads.append(f"{points(lead)} ({STREAM_WORDS[stream][0].lower()}, {shots} shots)")
        if leads:
            said.append(f"The defaults against {words}, in points: {'; '.join(leads)}.")
    related = found.get(("related", 16), Results([]))
    worth = {arm: difference(related.scores(START), related.scores(arm)) for arm in INGREDIENTS if arm in related.arms}
    sure = {arm: each for arm, each in worth.items() if each is not None and each.excludes_zero}
    if worth:
        named = {
            word: [f"{INGREDIENTS[arm]} ({points(each)})" for arm, each in sure.items() if (each.mean > 0) is helps]
            for word, helps in (("helps", True), ("harms", False))
        }
        shown = "; ".join(f"{' and '.join(names) or 'none'} {word}" for word, names in named.items())
        others = len(worth) - len(sure)
        said.append(
            f"Of {len(worth)} ingredients and pairs of them, each left out alone: {shown} a task's own adapter; the "
            f"intervals of the others ({others}) contain 0. If none were worth anything, "
            f"{1 - CONFIDENCE ** len(worth):.0%} of such studies would still show an interval without 0. All are on by "
            "default."
        )
        gain = difference(related.forgetting(START), related.forgetting("fifo"))
        if gain is not None and gain.excludes_zero:
            said.append(f"Forgetting of the live queue by PCA less that of first in first out: {points(gain)} points.")
    return [line for each in said for line in fill(each, 120, initial_indent="- ", subsequent_indent="  ").split("\n")]


def page(found: Found, images: Path) -> str:
    """The page, whose pictures are written into a folder."""
    declared = {(run.stream, run.shots, run.arm, run.draw) for part in PARTS.values() for run in part()}
    done = sum(len(each.records(arm)) for each in found.values() for arm in each.arms)
    planned = sum(arm != LINEAR for _, _, arm, _ in declared)
    missing = "" if done >= planned else "; what is not done is missing below, not left out because of its outcome"
    paragraphs = (
        "The questions, the arms and what counts as a yes were declared before the first run, in `bench/learning.md`. "
        f"Of {planned} runs that train prompts, {done} are done{missing}.",
        "Accuracy is the mean over the tasks of a stream after the first, on test examples. Differences are in points, "
        "paired by draw, with 95% intervals; bold: the interval excludes 0. Draws share a fixed pool of texts, so "
        "intervals are about draws from it, not about other texts.",
    )
    lines = ["# What learning gains from earlier tasks", ""]
    for paragraph in paragraphs:
        lines += [fill(paragraph, 120), ""]
    lines += [*in_short(found), ""]
    asked = [each.cells for each in answers(found)]
    lines += ["## Answers", "", *markdown_table("question|what counts as a yes|found|answer", asked), "", LEGEND, ""]
    for (stream, shots), results in found.items():
        title, words = STREAM_WORDS[stream]
        name = f"learning-{stream}-{shots}.png"
        if len(results.arms) > 1 and results.scores(BASE):
            picture(results, f"{title}, {shots} shots").savefig(images / name)
            image = [f"![Differences to a random start]({images.name}/{name})", ""]
        else:
            image = []
        lines += [f"## {title}, {shots} shots", "", words, "", *table(results), "", *image]
        if START in results.arms:
            lines += [fill(starts(results), 120), ""]
            if {*FASTER} & {*results.arms}:
                lines += [fill(against_controls(results), 120), ""]
            if START_MIXED in results.arms:
                lines += [fill(against_all_examples(results), 120), ""]
        if {*INGREDIENTS} & {*results.arms}:
            lines += ["### What each ingredient is worth", "", fill(WORTH, 120), "", *ingredients(results), ""]
        if {*PLACES} & {*results.arms}:
            lines += ["### Where prompts are, and how many", "", *places(results), ""]
    lines += [
        "```bash",
        "python -m qtuning_fast.bench.learning.run --jobs 2  # what is left",
        "python -m qtuning_fast.bench.learning.report        # this page",
        "```",
    ]
    return "\n".join(lines) + "\n"


def for_readme(found: Found) -> str:
    """What README says: accuracy by the number of examples, what of it earlier tasks give, and where they do not."""
    head = "closed-form-head"
    columns = {
        START_MIXED: "the defaults",
        START: "… without mixing",
        head: "… and prompts from random rows",
        BASE: "… and heads from random",
        "probe": "linear probe",
        ALL_EXAMPLES: "closed form of all",
    }
    rows, draws, steps = [], set[int](), ""
    for (stream, shots), results in sorted(found.items()):
        scores = {name: results.scores(name) for name in columns}
        if stream != "related" or not all(scores.values()):
            continue
        lead, by_tasks = (difference(scores[ours], scores[than]) for ours, than in ((START_MIXED, BASE), (START, head)))
        cells = [accuracy(each) for each in scores.values()]
        rows.append([str(shots), *cells, points(lead, mark=False), points(by_tasks, mark=False)])
        draws |= {len(each) for each in scores.values()}
        if shots == 16:
            mine, theirs = (Estimate.of(list(results.steps(name).values())).mean for name in (START_MIXED, BASE))
            steps = f" With 16 texts a class it needs {mine:.0f} steps where a random start needs {theirs:.0f}."
    said = (
        "A task starts with a head in closed form and, where that suits it, with prompt and head of earlier tasks; "
        "after training, its head is joined by the closed form of its training and its 16 validation texts a class. "
        "On five tasks of positive and negative texts, one after another, the mean accuracy of the second to the fifth "
        f"(each under its own adapter, {' to '.join(map(str, sorted(draws)))} draws, 95% intervals) is as follows. "
        "The defaults and the closed form of all learn from validation texts, too; other columns only choose by them."
    )
    titles = "|".join(["texts a class", *columns.values(), "gain in points", "of it by earlier tasks"])
    lines = [fill(said, 120), "", *markdown_table(titles, rows), "", f"![Gains]({IMAGES}/learning-related-16.png)", ""]
    unrelated = found.get(("unrelated", 16))
    lead = None if unrelated is None else difference(unrelated.scores(START_MIXED), unrelated.scores(BASE))
    if lead is not None and lead.draws >= FIRST:
        steps += f" On unrelated tasks the gain is {points(lead, mark=False)} points."
    more = (
        f"{steps} [The study](docs/learning.md) was declared before it ran, and says what is still open; it has peers, "
        "classifiers that transfer, and what queue, reweighting and gate are worth each."
    )
    return "\n".join([*lines, fill(more.strip(), 120)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=OUT, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE")
    options = parser.parse_args(arguments)
    options.images.mkdir(parents=True, exist_ok=True)
    found = read(options.results)
    options.page.write_text(page(found, options.images), encoding="utf-8")
    before, _, rest = options.readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    options.readme.write_text(f"{before}{BEGIN}{for_readme(found)}{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
