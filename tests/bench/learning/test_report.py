"""The page of the study says what its files say, and what is missing."""

from pathlib import Path
from typing import Any

from qtuning_fast.bench.learning.arms import WITHOUT, Run
from qtuning_fast.bench.learning.report import BEGIN, CONTROL, END, INGREDIENTS, main
from qtuning_fast.bench.learning.run import OUT, result_file

FAST = ("from-random, faster network", 0.75)


def entry(arm: str, draw: int, value: float) -> dict[str, Any]:
    chosen = {"rows": "random", "donor": None, "head": "closed-form", "mixed_with": [], "loss": 0.5}
    start = {"chosen": chosen, "considered": [chosen]}
    task = {"best_step": 10, "validation_curve": [[10, 0.5]], "start": start}
    accuracy = {"task_adapter": [0.9, value], "live_queue": [0.9, value - 0.1]}
    about = {"stream": "related", "shots": 16, "arm": arm, "draw": draw, "accuracy": accuracy, "forgetting": value / 10}
    return about | {"per_task": [task, task]}


def test_the_page_has_each_arm_its_difference_and_the_share_of_runs_that_are_done(tmp_path: Path) -> None:
    import json

    for draw in range(3):
        ours = (("start", 0.8 + 0.01 * draw), ("start, head mixed", 0.85), ("fifo", 0.9 + 0.001 * draw))
        for arm, value in (*ours, ("from-random", 0.7), ("no gate", 0.79), ("no queue", 0.6), ("input", 0.7), FAST):
            file = result_file(tmp_path / "results", Run("related", 16, arm, draw))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(entry(arm, draw, value)))
    page, images = tmp_path / "learning.md", tmp_path / "images"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}old\n{END}after\n")
    paths = {"--results": tmp_path / "results", "--page": page, "--images": images, "--readme": readme}
    assert main([part for name, path in paths.items() for part in (name, str(path))]) == 0
    text = " ".join(page.read_text().split())
    assert "24 are done; what is not done is missing below" in text
    assert "| `start` | 3 | 0.810 | **+11.0 ± 2.5** | – | 10 | 0.710 |" in text
    assert "| **+11.0 ± 2.5** against `from-random`; " not in text  # prompts alone are missing
    assert "| gate | `no gate` | 3 | +2.0 ± 2.5 | +2.0 ± 2.5 | +0.2 ± 0.2 |" in text
    assert "| `input` | 3 | 0.700 | **-11.0 ± 2.5** | **-11.0 ± 2.5** |" in text
    assert "Where the 3 tasks after the first started: 3 from random rows." in text
    assert "The defaults against random starts, in points: **+15.0 ± 0.0** (related tasks, 16 shots)." in text
    assert "queue of several prompts (**+21.0 ± 2.5**) helps" in text
    assert "PCA, not first in first out (**-9.1 ± 2.2**) harms" in text
    assert "a task's own adapter; the intervals of the others (1) contain 0" in text
    assert "`start`, in points: **+6.0 ± 2.5** against `from-random, faster network`." in text
    assert readme.read_text().startswith(f"before\n{BEGIN}A task starts with") and readme.read_text().endswith(
        f"{END}after\n"
    )
    assert "old" not in readme.read_text()
    assert [path.name for path in images.iterdir()] == ["learning-related-16.png"]


def test_each_arm_that_lacks_an_ingredient_is_in_the_table_of_ingredients() -> None:
    assert {*WITHOUT, CONTROL} == {*INGREDIENTS}


def test_the_published_page_is_that_of_the_published_files(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(Path("README.md").read_text())
    paths = {"--page": "page.md", "--images": "images", "--readme": "README.md"}
    assert main([part for name, path in paths.items() for part in (name, str(tmp_path / path))]) == 0
    assert OUT.is_dir() and (tmp_path / "page.md").read_text() == Path("docs/learning.md").read_text()
    assert (tmp_path / "README.md").read_text() == Path("README.md").read_text()
