"""Write the study's table into docs/language-models.md, and its picture, from its files, whole or as far as they go.

python -m qtuning_fast.bench.language.report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import TextWrapper

from matplotlib.figure import Figure

from qtuning_fast.bench.language.arms import ARMS, DEFAULT, MODELS, RATES, STREAM, all_runs
from qtuning_fast.bench.language.rates import rates_file
from qtuning_fast.bench.language.run import OUT
from qtuning_fast.bench.language.summary import Found, Record, by_task, means, of_a_task, read
from qtuning_fast.bench.learning.report import markdown_table
from qtuning_fast.bench.learning.summary import Estimate, difference, points
from qtuning_fast.lifelong.report.plot_style import INK, OTHER_COLOUR, PALETTE, new_figure
from qtuning_fast.model.checked_files import read_json

PAGE, IMAGES = Path("docs/language-models.md"), Path("docs/images")
PICTURE = "language-models.png"
LEAST_DRAWS = 3  # of an interval in the picture; one of two draws would be wider than all others together
BEGIN, END = "<!-- study: begin, written by bench.language.report -->\n", "<!-- study: end -->\n"

HEAD = ("model", "arm", "draws", "mean", f"`{DEFAULT}` less it", "numbers trained", "ms a step", "kB a task")
EXPLAINED = (
    "Means over draws 1 to 5 or fewer. *less it*: the mean accuracy of `default` less that of the arm, in points, "
    "paired by draw, with the 95% interval; bold: the interval excludes 0. An interval of two draws is wide: it is "
    "12.7 standard errors to each side, and the picture leaves it out. Numbers trained, times of a step and stored "
    "kilobytes are medians over tasks."
)


def table(found: Found) -> list[str]:
    """Each arm's accuracy, what the default gains over it, and what it costs."""
    tasks = [source.name for source in STREAM.sources]
    rows = []
    for model in (each for each in MODELS if each in found):
        arms = found[model]
        ours = means(arms.get(DEFAULT, {}))
        for arm in (each for each in ARMS if each in arms):
            draws, own = arms[arm], by_task(arms[arm])
            accuracies = means(draws)
            cells = [MODELS[model].title, f"`{arm}`", str(len(draws))]
            cells += [f"{own[name]:.3f}" if name in own else "–" for name in tasks]
            cells.append(f"**{Estimate.of(list(accuracies.values())).mean:.3f}**")
            cells.append("" if arm == DEFAULT else points(difference(ours, accuracies)))
            rows.append([*cells, *costs(draws)])
    return markdown_table("|".join([*HEAD[:3], *tasks, *HEAD[3:]]), rows)


def costs(draws: dict[int, Record]) -> list[str]:
    """What a task of an arm costs: numbers, time and bytes."""
    numbers, seconds, size = (
        of_a_task(draws, measure) for measure in ("trained_parameters", "step_seconds", "stored_bytes")
    )
    return [
        f"{numbers:,.0f}" if numbers else "0",
        "–" if seconds is None else f"{1000 * seconds:.0f}",
        f"{size / 1000:,.1f}" if size else "0",
    ]


def picture(found: Found) -> Figure:
    """What the default gains over each other arm, in points, with the intervals; a panel for each model."""
    models = [model for model in MODELS if len(found.get(model, {})) > 1 and DEFAULT in found[model]]
    title = "What the default gains over other ways to learn from 16 examples a class"
    figure, panels = new_figure(title, height=1.2 + 1.9 * len(models), panels=len(models))
    for axes, model in zip(panels, models):
        arms = found[model]
        leads = {arm: difference(means(arms[DEFAULT]), means(arms[arm])) for arm in ARMS if arm in arms}
        drawn = [(arm, lead) for arm, lead in leads.items() if arm != DEFAULT and lead is not None]
        for row, (arm, lead) in enumerate(drawn):
            color = PALETTE["linear_probe"] if arm in RATES else OTHER_COLOUR
            width = 100 * (lead.half_width or 0) if lead.draws >= LEAST_DRAWS else 0
            axes.errorbar(100 * lead.mean, row, xerr=width, fmt="o", color=color, capsize=3, markersize=5)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(drawn)), [f"{arm} (draws: {lead.draws})" for arm, lead in drawn])
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.set_title(MODELS[model].title, fontsize=10, color=INK, loc="left")
    panels[-1].set_xlabel("points, with 95% intervals of three draws or more")
    return figure


def chosen_rates(folder: Path) -> list[str]:
    """The rates of peft's methods, and whether a longer grid might have had a better one."""
    said = []
    for model in MODELS:
        file = rates_file(folder, model)
        if file.exists():
            chosen = {arm: each["rate"] for arm, each in read_json(file).items() if arm in RATES}
            rates = [
                f"{arm} {rate:g}" + " (an end of its grid)" * (rate in (min(RATES[arm]), max(RATES[arm])))
                for arm, rate in chosen.items()
            ]
            said.append(f"{MODELS[model].title}: {', '.join(rates)}.")
    return [f"Rates that were chosen for peft's methods: {' '.join(said)}"] if said else []


def block(folder: Path, images: Path) -> str:
    """What stands between the page's marks; the picture is written into a folder of images."""
    found, runs = read(folder), all_runs()
    how = (
        "`bench/language.md` declares the study: what is asked, what is run, and what counts as a yes. "
        "`make bench-language` runs it and writes table and picture here."
    )
    fill = TextWrapper(width=120, break_on_hyphens=False).fill  # a name keeps its hyphens
    lines = [fill(how), ""]
    done = sum(len(draws) for arms in found.values() for draws in arms.values())
    if not done:
        return "\n".join(lines)
    for paragraph in (f"Of {len(runs)} runs {done} are done.", EXPLAINED, *chosen_rates(folder)):
        lines += [fill(paragraph), ""]
    lines += [*table(found), ""]
    if any(len(arms) > 1 and DEFAULT in arms for arms in found.values()):
        images.mkdir(parents=True, exist_ok=True)
        picture(found).savefig(images / PICTURE)
        lines += [f"![What the default gains over each other arm]({images.name}/{PICTURE})", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the study's part of the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=OUT, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="FOLDER")
    options = parser.parse_args(arguments)
    before, begin, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        parser.error(
            f"{options.page} lacks the marks between which the study is written: {BEGIN.strip()} {END.strip()}"
        )
    text = f"{before}{BEGIN}\n{block(options.results, options.images)}{END}{after}"
    options.page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
