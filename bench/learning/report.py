"""Write docs/learning.md and its pictures from the study's files, whole or as far as they go.

python -m qtuning_fast.bench.learning.report
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from qtuning_fast.bench.learning.arms import LINEAR, PARTS
from qtuning_fast.bench.learning.linear import CLASSIFIERS
from qtuning_fast.bench.learning.run import OUT
from qtuning_fast.bench.learning.summary import BASE, Estimate, Results, difference, read
from qtuning_fast.lifelong.metrics import START_ROWS
from qtuning_fast.lifelong.report.plot_style import INK, PALETTE, new_figure

PAGE = Path("docs/learning.md")
IMAGES = Path("docs/images")

TITLES = {"related": "Related tasks", "halves": "Halves of one task", "unrelated": "Unrelated tasks"}


def points(estimate: Estimate | None, *, mark: bool = True) -> str:
    """A difference in points with its interval; bold if that excludes 0."""
    if estimate is None:
        return "–"
    if estimate.half_width is None:
        return f"{100 * estimate.mean:+.1f}"
    text = f"{100 * estimate.mean:+.1f} ± {100 * estimate.half_width:.1f}"
    return f"**{text}**" if mark and estimate.excludes_zero else text


def accuracy(values: dict[int, float]) -> str:
    return f"{Estimate.of(list(values.values())).mean:.3f}" if values else "–"


def table(results: Results) -> list[str]:
    """Each arm's accuracy, its differences to random starts and to the tuned probe, its steps and its live queue."""
    lines = [
        "| arm | draws | adapters | against `from-random` | against the probe | steps to 95% | live queue |",
        "|---|---|---|---|---|---|---|",
    ]
    base, probe = results.scores(BASE), results.scores("probe")
    for arm in results.arms:
        ours, steps = results.scores(arm), results.steps(arm)
        cells = [f"`{arm}`", str(len(ours)), accuracy(ours)]
        cells += ["" if arm == BASE else points(difference(ours, base)), points(difference(ours, probe))]
        cells += [
            f"{Estimate.of(list(steps.values())).mean:.0f}" if steps else "–",
            accuracy(results.scores(arm, "live_queue")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
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
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def picture(results: Results, title: str) -> Figure:
    """The differences to random starts in points, with their intervals."""
    base = results.scores(BASE)
    names = [*(arm for arm in results.arms if arm != BASE), *CLASSIFIERS]
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
    """How often tasks after the first started from what, under the defaults."""
    chosen = [task["start"]["chosen"] for record in results.records("start") for task in record["per_task"][1:]]
    counts = Counter(START_ROWS[each["rows"]] + ", heads mixed" * bool(each["mixed_with"]) for each in chosen)
    shares = "; ".join(f"{count} from {kind}" for kind, count in counts.most_common())
    return f"Where the {len(chosen)} tasks after the first started: {shares}."


def page(found: dict[tuple[str, int], Results], images: Path) -> str:
    """The page, whose pictures are written into a folder."""
    declared = {(run.stream, run.shots, run.arm, run.draw) for part in PARTS.values() for run in part()}
    done = sum(len(each.records(arm)) for each in found.values() for arm in each.arms)
    planned = sum(arm != LINEAR for _, _, arm, _ in declared)
    missing = "" if done >= planned else "; what is not done is missing below, not left out because of its outcome"
    paragraphs = (
        "The questions, the arms and what counts as a yes were declared before the first run, in `bench/learning.md`. "
        f"Of {planned} runs that train, {done} are done{missing}.",
        "Accuracy is the mean over the tasks of a stream after the first, on test examples. Differences are in points, "
        "paired by draw, with 95% intervals; bold: the interval excludes 0. Draws share a fixed pool of texts, so "
        "intervals are about draws from it, not about other texts. Steps are those to 95% of the validation accuracy "
        "that `from-random` ends with.",
    )
    lines = ["# What learning gains from earlier tasks", ""]
    for paragraph in paragraphs:
        lines += [fill(paragraph, 120), ""]
    for (stream, shots), results in found.items():
        title = TITLES.get(stream, stream)
        name = f"learning-{stream}-{shots}.png"
        if len(results.arms) > 1 and results.scores(BASE):
            picture(results, f"{title}, {shots} shots").savefig(images / name)
            image = [f"![Differences to a random start]({images.name}/{name})", ""]
        else:
            image = []
        lines += [f"## {title}, {shots} shots", "", *table(results), "", *image]
        if "start" in results.arms:
            lines += [fill(starts(results), 120), ""]
    lines += [
        "```bash",
        "python -m qtuning_fast.bench.learning.run --jobs 2  # what is left",
        "python -m qtuning_fast.bench.learning.report        # this page",
        "```",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=OUT, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.images.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(read(options.results), options.images), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
