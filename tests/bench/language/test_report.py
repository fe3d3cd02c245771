"""The page of the study of language models says what its files say, and claims nothing without them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qtuning_fast.bench.language.arms import MODELS, RATES, TUNING_TASKS, RateRun, Run
from qtuning_fast.bench.language.rates import choose
from qtuning_fast.bench.language.report import BEGIN, END, PAGE, PICTURE, main, picture
from qtuning_fast.bench.language.run import OUT, result_file
from qtuning_fast.bench.language.summary import read
from qtuning_fast.model.checked_files import write_json


def write(folder: Path, run: Run, accuracy: float, **measures: Any) -> None:
    costs = {"trained_parameters": 0, "stored_bytes": 0, "step_seconds": None} | measures
    tasks = [{"name": name, "accuracy": accuracy + more, **costs} for name, more in (("trec", 0.0), ("r8", 0.1))]
    about = {"model": run.model, "arm": run.arm, "draw": run.draw, "fingerprint": run.model}
    file = result_file(folder, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, about | {"per_task": tasks})


def written(tmp_path: Path) -> str:
    page = tmp_path / "language-models.md"
    page.write_text(f"before\n{BEGIN}stale\n{END}after\n")
    paths = {"--results": tmp_path / "results", "--page": page, "--images": tmp_path / "images"}
    assert main([part for name, path in paths.items() for part in (name, str(path))]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}") and text.endswith(f"{END}after\n") and "stale" not in text
    return " ".join(text.split())


def test_table_and_picture(tmp_path: Path) -> None:
    out = tmp_path / "results"
    for draw in range(1, 6):
        write(
            out,
            Run("flan-t5", "default", draw),
            0.6 + 0.01 * draw,
            trained_parameters=12345,
            stored_bytes=50_120,
            step_seconds=0.25,
        )
        write(out, Run("flan-t5", "lora", draw), 0.5, trained_parameters=99, stored_bytes=600, step_seconds=0.5)
        write(out, Run("smollm2", "zero-shot", draw), 0.3)
    write(out, Run("smollm2", "default", 1), 0.8)
    for arm, rates in RATES.items():
        for number, rate in enumerate(rates):
            for task in TUNING_TASKS:
                run = RateRun("flan-t5", arm, rate, task)
                file = result_file(out, run)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, {"loss": abs(number - (0 if arm == "lora" else 1))})
    choose(out, "flan-t5")
    text = written(tmp_path)
    assert "Of 57 runs 16 are done." in text
    assert "| flan-t5-small | `default` | 5 | 0.630 | 0.730 | – | **0.680** | | 12,345 | 250 | 50.1 |" in text
    assert "| flan-t5-small | `lora` | 5 | 0.500 | 0.600 | – | **0.550** | **+13.0 ± 2.0** | 99 | 500 | 0.6 |" in text
    assert "| SmolLM2-135M-Instruct | `zero-shot` | 5 | 0.300 | 0.400 | – | **0.350** | +50.0 | 0 | – | 0 |" in text
    said = "flan-t5-small: lora 0.0003 (an end of its grid), prompt-tuning 0.1, prefix-tuning 0.03."
    assert f"Rates that were chosen for peft's methods: {said}" in text
    assert f"(images/{PICTURE})" in text and (tmp_path / "images" / PICTURE).is_file()


def test_the_picture_has_intervals_of_three_draws_or_more(tmp_path: Path) -> None:
    for model, draws in (("flan-t5", 3), ("smollm2", 2)):
        for draw in range(1, draws + 1):
            write(tmp_path, Run(model, "default", draw), 0.5 + 0.1 * draw)
            write(tmp_path, Run(model, "lora", draw), 0.5)
    panels = picture(read(tmp_path)).axes
    widths = []
    for axes in panels:
        [[bar]] = [each.get_segments() for each in axes.collections]
        widths.append(float(bar[1][0] - bar[0][0]))
    assert widths == [0, pytest.approx(2 * 24.84, abs=0.01)]  # t(2) is 4.303, the standard error 5.77 points
    assert [axes.get_title(loc="left") for axes in panels] == [model.title for model in MODELS.values()]


def test_without_runs_it_claims_nothing(tmp_path: Path) -> None:
    text = written(tmp_path)
    between = text[text.index(BEGIN.strip()) + len(BEGIN) : text.index(END.strip())]
    assert "`make bench-language` runs it and writes table and picture here." in between
    assert "|" not in between and not re.search(r"\d", between) and not (tmp_path / "images").exists()


def test_a_page_without_marks_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        main(["--page", str(page), "--results", str(tmp_path)])
    assert "lacks the marks" in capsys.readouterr().err and page.read_text() == "no marks"


def test_the_published_page_is_that_of_the_published_files(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    assert main(["--page", str(page), "--images", str(tmp_path / "images")]) == 0
    assert page.read_text() == PAGE.read_text()


def test_how_defaults_were_found_is_what_its_file_says() -> None:
    entries = json.loads((OUT / "defaults.json").read_text())["found"]
    assert {entry["model"] for entry in entries} == {*MODELS}
    text = PAGE.read_text()
    for entry in entries:
        [row] = [
            line
            for line in text.splitlines()
            if line.startswith(f"| {MODELS[entry['model']].title} | {entry['task']} | {entry['setting']} |")
        ]
        shown = [re.sub(r"\*", "", cell).strip() for cell in row.split("|")[4:-1]]
        assert shown == ["" if accuracy is None else f"{accuracy:.2f}" for accuracy in entry["accuracy"]], row
