"""The rate with the least mean loss is chosen, once all runs are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtuning_fast.bench.language.arms import RATES, TUNING_TASKS, RateRun, rate_runs
from qtuning_fast.bench.language.rates import choose, left_of, rate_of, rates_file
from qtuning_fast.model.checked_files import read_json, write_json


def write(out: Path, run: RateRun, loss: float) -> None:
    file = out / f"{run.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"loss": loss})


def test_the_least_mean_loss(tmp_path: Path) -> None:
    choose(tmp_path, "smollm2")
    assert not rates_file(tmp_path, "smollm2").exists()
    with pytest.raises(FileNotFoundError, match="has no rate of lora"):
        rate_of(tmp_path, "smollm2", "lora")
    # The means are 1.0, 0.7 and 0.8; on each task alone another rate is best.
    losses = dict(zip(RATES["lora"], [(0.1, 1.9), (0.7, 0.7), (1.0, 0.6)]))
    for rate, found in losses.items():
        for task, loss in zip(TUNING_TASKS, found):
            write(tmp_path, RateRun("smollm2", "lora", rate, task), loss)
    write(tmp_path, RateRun("smollm2", "prompt-tuning", RATES["prompt-tuning"][0], TUNING_TASKS[0]), 0.1)
    choose(tmp_path, "smollm2")
    assert rate_of(tmp_path, "smollm2", "lora") == RATES["lora"][1]
    kept = read_json(rates_file(tmp_path, "smollm2"))
    assert kept["lora"]["loss"]["0.001"] == pytest.approx(0.7)
    with pytest.raises(FileNotFoundError, match="has no rate of prompt-tuning"):  # of which runs are missing
        rate_of(tmp_path, "smollm2", "prompt-tuning")
    assert len(left_of(tmp_path)) == len(rate_runs()) - 7
