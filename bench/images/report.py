"""Write docs/images.md and its pictures from the study's files, whole or as far as they go.

python -m qtuning_fast.bench.images.report
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

from qtuning_fast.bench.images.arms import GATE_ARMS, ROWS, SEEDS, all_runs
from qtuning_fast.bench.images.run import OUT
from qtuning_fast.bench.learning.report import markdown_table
from qtuning_fast.bench.learning.summary import Estimate, difference, points
from qtuning_fast.lifelong.report.plot_style import INK, OTHER_COLOUR, PALETTE, new_figure

PAGE, IMAGES = Path("docs/images.md"), Path("docs/images")

Record = dict[str, Any]
Found = dict[str, dict[int, Record]]
"""The content of the runs' files, by arm and seed."""

MEASURES = {
    "average_accuracy": "FA",
    "cumulative_average_accuracy": "CA",
    "forgetting": "forgetting",
    "task_found": "task found",
}


@dataclass(frozen=True)
class Question:
    """Whether one method is better than another.

    Attributes:
        words: the question.
        ours, theirs: what is compared.
        surely: whether the interval must exclude 0; otherwise it is enough not to be below.
    """

    words: str
    ours: str
    theirs: str
    surely: bool = True

    @property
    def wanted(self) -> str:
        """What counts as a yes."""
        return "above 0, and an interval without 0" if self.surely else "not below"


QUESTIONS = (
    Question("Does the gate pay?", "norga", "hide"),
    Question("Is the default as good as RanPAC?", "default", "ranpac", surely=False),
    Question("Is the default as good as the nearest class mean?", "default", "simple-cil", surely=False),
    Question("Does one head over all classes pay?", "hide", "hide, each task's own head"),
    Question("Do trained prompts pay without the task's name?", "default", "closed form"),
)
INTRODUCTION = (
    "What was asked, what was run and what counts as a yes stood in `bench/images.md` before the first run.",
    "The stream is `clipart-8`: [eight groups of drawings](data.md#packaged-images), 30 kinds of 16 training images. "
    "The model is a DINOv2-small at 112 pixels, frozen. Nobody names the task of a test image. FA is the mean accuracy "
    "over all tasks after the last, CA that mean after each task, averaged; means over seeds, which draw the images. "
    "Differences are in points of FA, paired by seed, with 95% intervals; bold: the interval excludes 0.",
)


def read(folder: Path) -> Found:
    """Read the runs' files."""
    found: Found = {}
    for file in sorted(folder.glob("*/*.json")):
        record = json.loads(file.read_text())
        found.setdefault(record["arm"], {})[record["seed"]] = record
    models = {(record["model"], record["pixels"]) for runs in found.values() for record in runs.values()}
    if len(models) > 1:
        raise ValueError(f"the runs in {folder} are of {len(models)} models or sizes of images; keep one")
    return found


def values(found: Found, row: str, measure: str = "average_accuracy") -> dict[int, float]:
    """Return a measure of what is compared, by seed; empty where it has none."""
    arm, answers = ROWS[row]
    records = found.get(arm, {})
    return {
        seed: record["answers"][answers][measure]
        for seed, record in records.items()
        if measure in record["answers"][answers]
    }


def table(found: Found) -> list[str]:
    """Each method's measures, and its lead over the nearest class mean."""
    rows = []
    for row in ROWS:
        mine = values(found, row)
        if mine:
            numbers = [_mean(values(found, row, measure)) for measure in MEASURES]
            lead = "" if row == "simple-cil" else points(difference(mine, values(found, "simple-cil")))
            rows.append([f"`{row}`", str(len(mine)), *numbers, lead])
    return markdown_table("|".join(["answers by", "seeds", *MEASURES.values(), "against `simple-cil`"]), rows)


def questions(found: Found) -> list[str]:
    """The declared questions with their answers, as far as the results go."""
    rows = []
    for each in QUESTIONS:
        lead = difference(values(found, each.ours), values(found, each.theirs))
        if lead is None:
            rows.append([each.words, each.wanted, "–", "open"])
            continue
        yes = lead.mean >= 0 and (lead.excludes_zero or not each.surely)
        answer = f"**{'yes' if yes else 'no'}**" if lead.draws == SEEDS else f"{'yes' if yes else 'no'} so far"
        rows.append([each.words, each.wanted, f"{points(lead)} (`{each.ours}` less `{each.theirs}`)", answer])
    return markdown_table("question|what counts as a yes|found|answer", rows)


def gates(found: Found) -> list[str]:
    """NoRGa with each gate, on one seed."""
    rows = []
    for arm in ("norga", *GATE_ARMS):
        record = found.get(arm, {}).get(0)
        if record is not None:
            name = "tanh" if arm == "norga" else arm.partition(", ")[2]
            rows.append([name, *(f"{record['answers']['joint_head'][measure]:.3f}" for measure in MEASURES)])
    return markdown_table("|".join(["gate", *MEASURES.values()]), rows)


def curves(found: Found) -> Figure:
    """The mean accuracy over the tasks so far, after each task."""
    figure, [axes] = new_figure("Accuracy over the tasks so far, task not named", height=4.4)
    colours = {
        "default": PALETTE["adapters"],
        "norga": PALETTE["joint_head"],
        "hide": "#D55E00",
        "ranpac": OTHER_COLOUR,
        "closed form": PALETTE["closed_form"],
        "simple-cil": PALETTE["nearest_class_mean"],
    }
    for row, colour in colours.items():
        matrices = values(found, row, "accuracy_matrix")
        if matrices:
            means = [_so_far(matrix) for matrix in matrices.values()]
            mean = [fmean(each) for each in zip(*means)]
            axes.plot(range(1, len(mean) + 1), mean, marker="o", markersize=4, color=colour, label=row)
    upper = values(found, "probe-joint")
    if upper:
        axes.axhline(fmean(upper.values()), color=INK, linewidth=0.9, linestyle=":", label="probe-joint, at the end")
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("mean accuracy")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, frameon=False)
    return figure


def page(found: Found, images: Path) -> str:
    """The page, whose picture is written into a folder."""
    done = sum(map(len, found.values()))
    lines = ["# Class-incremental learning of images", ""]
    for paragraph in (*INTRODUCTION, f"Of {len(all_runs())} runs {done} are done."):
        lines += [fill(paragraph, 120), ""]
    lines += ["## Answers", "", *questions(found), "", "## Methods", "", *table(found), ""]
    if any(values(found, row) for row in ROWS):
        curves(found).savefig(images / "clipart-8.png")
        lines += [f"![Accuracy over the tasks so far]({images.name}/clipart-8.png)", ""]
    if {*GATE_ARMS} & {*found}:
        lines += ["## Gates", "", "NoRGa with each gate, one seed: too little to order them.", "", *gates(found), ""]
    lines += [
        "```bash",
        "python -m qtuning_fast.bench.images.run --model runs/dinov2-small --jobs 2  # what is left",
        "python -m qtuning_fast.bench.images.report                                  # this page",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _mean(numbers: dict[int, float]) -> str:
    return f"{Estimate.of(list(numbers.values())).mean:.3f}" if numbers else "–"


def _so_far(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    return [fmean(each for each in row if each is not None) for row in matrix]


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
