"""The learning rates of peft's methods, chosen on validation examples of tasks that the study does not report."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from qtuning_fast.bench.language.arms import RATES, RateRun, rate_runs
from qtuning_fast.model.checked_files import read_json, write_json


def rates_file(out: Path, model: str) -> Path:
    """The file that keeps the rates of a model."""
    return out / model / "rates.json"


def choose(out: Path, model: str) -> None:
    """Write the rates of a model, those with the least mean loss; nothing while runs are missing.

    Args:
        out: the folder of results, where each `RateRun` leaves a `loss`.
        model: its name in the study.
    """
    losses: dict[str, dict[float, list[float]]] = {arm: {rate: [] for rate in rates} for arm, rates in RATES.items()}
    for run in rate_runs():
        if run.model == model:
            file = out / f"{run.name}.json"
            if file.exists():
                losses[run.arm][run.rate].append(read_json(file)["loss"])
    tasks = len({run.task for run in rate_runs()})
    whole = {arm: found for arm, found in losses.items() if all(len(each) == tasks for each in found.values())}
    means = {arm: {rate: fmean(each) for rate, each in found.items()} for arm, found in whole.items()}
    if means:
        write_json(
            rates_file(out, model),
            {
                arm: {"rate": min(mean, key=mean.__getitem__), "loss": {f"{rate:g}": mean[rate] for rate in mean}}
                for arm, mean in means.items()
            },
        )


def rate_of(out: Path, model: str, arm: str) -> float:
    """Return the rate that was chosen.

    Raises:
        FileNotFoundError: none was.
    """
    file = rates_file(out, model)
    if not file.exists() or arm not in (chosen := read_json(file)):
        raise FileNotFoundError(
            f"{file} has no rate of {arm}; the study chooses rates before anything else, so something failed there"
        )
    return float(chosen[arm]["rate"])


def left_of(out: Path) -> list[RateRun]:
    """The runs that are still needed to choose rates."""
    return [run for run in rate_runs() if not (out / f"{run.name}.json").exists()]
