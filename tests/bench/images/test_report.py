"""The page of the study of images says what its files say, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qtuning_fast.bench.images.arms import Run
from qtuning_fast.bench.images.report import main
from qtuning_fast.bench.images.run import OUT, result_file


def record(arm: str, seed: int, **answers: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "model": "a model",
        "pixels": 112,
        "answers": {
            name: {
                "average_accuracy": fa,
                "cumulative_average_accuracy": fa + 0.1,
                "forgetting": 0.05,
                "task_found": 0.6,
                "accuracy_matrix": [[0.9, None], [fa, fa]],
            }
            for name, fa in answers.items()
        },
    }


def test_the_page(tmp_path: Path) -> None:
    for seed in range(5):
        for each in (
            record("norga", seed, joint_head=0.52 + 0.001 * seed, adapters=0.5),
            record("hide", seed, joint_head=0.5, adapters=0.4),
            record("default", seed, adapters=0.45),
            record("simple-cil", seed, nearest_class_mean=0.5, closed_form=0.44, joint_regression=0.55),
        ):
            file = result_file(tmp_path / "results", Run(each["arm"], seed))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(each))
    gate = result_file(tmp_path / "results", Run("norga, sigmoid", 0))
    gate.parent.mkdir(parents=True)
    gate.write_text(json.dumps(record("norga, sigmoid", 0, joint_head=0.3)))
    page = tmp_path / "images.md"
    assert main(["--results", str(tmp_path / "results"), "--page", str(page), "--images", str(tmp_path / "docs")]) == 0
    text = " ".join(page.read_text().split())
    assert "Of 31 runs 21 are done." in text
    assert (
        "Does the gate pay? | above 0, and an interval without 0 | **+2.2 ± 0.2** (`norga` less `hide`) | **yes**"
        in text
    )
    assert "| Is the default as good as RanPAC? | not below | – | open |" in text
    assert "(`default` less `simple-cil`) | **no** |" in text and "(`default` less `closed form`) | **yes** |" in text
    assert "| `norga` | 5 | 0.522 | 0.622 | 0.050 | 0.600 | **+2.2 ± 0.2** |" in text
    assert "| `probe-joint` | 5 | 0.550 |" in text and "| sigmoid | 0.300 |" in text
    assert (tmp_path / "docs" / "clipart-8.png").is_file()


def test_the_published_page_is_that_of_the_published_files(tmp_path: Path) -> None:
    assert main(["--page", str(tmp_path / "page.md"), "--images", str(tmp_path / "images")]) == 0
    assert (tmp_path / "page.md").read_text() == Path("docs/images.md").read_text(), OUT
