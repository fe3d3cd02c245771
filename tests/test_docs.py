"""README and docs/: their Python runs, their links lead somewhere, the reference names what is public."""

from __future__ import annotations

import json
import re
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from qtuning_fast import __version__
from qtuning_fast.bench.learning.summary import Estimate, points
from qtuning_fast.lifelong.metrics import mean_and_spread
from qtuning_fast.model.checked_files import read_json

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(page: str) -> list[tuple[int, str]]:
    """The Python of a page, each block with the line above it."""
    text = (ROOT / page).read_text()
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


@pytest.fixture
def as_a_reader(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:  # what a block that is copied from a page meets, but for the model, which is tiny here
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch._dynamo.reset()

    def run(page: str) -> None:
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for line, block in blocks(page):
            code = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_model_folder))
            exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)

    return run


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_python_of_a_page_runs(page: str, as_a_reader: Any, request: pytest.FixtureRequest) -> None:
    if page == "docs/recipes/hub.md":
        request.getfixturevalue("hub")
    as_a_reader(page)


PRINTING = [page for page in PAGES if "\n<!-- printed, by " in (ROOT / page).read_text()]


@pytest.mark.parametrize("page", PRINTING)
def test_a_page_shows_what_its_python_prints(page: str) -> None:
    """To the word; numbers with a fraction within 0.05, since CPUs round differently."""
    run_page = runpy.run_path(str(DOCS / "run_page.py"))["executed"]
    shown = (ROOT / page).read_text()
    printed = run_page(shown, page)
    fraction = re.compile(r"\d+\.\d+")
    assert fraction.sub("#", printed) == fraction.sub("#", shown)
    numbers = [[float(x) for x in fraction.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.05)


def test_some_page_shows_what_its_python_prints() -> None:
    assert "docs/method-in-code.md" in PRINTING


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in LINK.findall(without_code((ROOT / page).read_text())):
        if "://" in target:
            continue
        there = (ROOT / page).parent / target if target else ROOT / page
        assert there.exists(), f"{page}: {target}"
        if page != "README.md":  # the site holds docs/ alone
            assert there.resolve().is_relative_to(DOCS), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in headings}
            assert anchor in anchors, f"{page}: {target}#{anchor}"


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_tests_that_a_page_names_exist() -> None:
    named = [(page, *found) for page in PAGES for found in NAMED_TEST.findall((ROOT / page).read_text())]
    assert len([page for page, *_ in named if page == "docs/drop-in.md"]) > 20
    for page, file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{page}: {file}::{test}"


def test_changelog_and_citation_have_the_version() -> None:
    dates = re.findall(rf"^## \[{re.escape(__version__)}\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    [date] = dates
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation and f"\ndate-released: {date}\n" in citation


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in listed) == PAGES[1:]


def test_the_reference_names_all_that_is_public() -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name
    public = {
        f"{module}.{name}"
        for module in ("qtuning_fast", "qtuning_fast.nn", "qtuning_fast.integrations.transformers")
        for name in import_module(module).__all__
    }
    short = {name.rpartition(".")[2] for name in named}
    missing = {name for name in public if name.rpartition(".")[2] not in short | {"__version__", "NAME"}}
    assert not missing


def test_the_figures_of_the_demo_are_those_of_its_run() -> None:
    metrics = json.loads((ROOT / "bench/results/offline-5/metrics.json").read_text())
    unnamed = metrics["class_incremental"]
    rows = {
        "each task with its stored adapter": metrics["task_adapter"]["accuracy_matrix"][-1],
        "linear probe, tuned, on the same examples": metrics["baselines"]["linear_probe"]["accuracy"],
        "all tasks under the live queue": metrics["live_queue"]["accuracy_matrix"][-1],
        "task not named: inferred, then its adapter": unnamed["adapters"]["accuracy_matrix"][-1],
    }
    page, text = (DOCS / "demo.md").read_text(), " ".join((DOCS / "demo.md").read_text().split())
    for name, accuracies in rows.items():
        shown = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        wanted = [*accuracies, sum(accuracies) / len(accuracies)]
        assert re.findall(r"\d\.\d{3}", shown) == [f"{value:.3f}" for value in wanted]
    marks = unnamed["baselines"]
    for said in (
        f"the task is right for {unnamed['adapters']['task_found']:.1%} of them",
        f"its own answers reach {unnamed['closed_form']['average_accuracy']:.3f}",
        f"Nearest class means find the task of {marks['nearest_class_mean']['task_found']:.1%}",
        f"finds it for {marks['joint_regression']['task_found']:.1%}; its answers reach "
        f"{marks['joint_regression']['average_accuracy']:.3f}",
        f"differs by {unnamed['calibration']['error']:.3f} on average",
        f"an AUROC of {unnamed['unknown']['mean_auroc']:.3f}",
        f"gives {unnamed['unknown']['false_alarms']:.1%} here, and notices {unnamed['unknown']['mean_detected']:.1%}",
    ):
        assert said in text, said
    for where in ("README.md", "docs/index.md", "docs/recipes/task-inference.md"):
        assert f"{unnamed['adapters']['average_accuracy']:.3f}" in (ROOT / where).read_text()


def test_the_figures_of_five_draws_are_those_of_their_summaries() -> None:
    folder = ROOT / "bench/results/offline-5"
    ours, theirs = read_json(folder / "summary.json"), read_json(folder / "at-random/summary.json")
    lines = (DOCS / "demo.md").read_text().splitlines()
    for name, of in {
        "stored adapters": lambda summary: summary["task_adapter"]["average_accuracy"],
        "live queue": lambda summary: summary["live_queue"]["average_accuracy"],
        "task not named": lambda summary: summary["class_incremental"]["adapters"]["average_accuracy"],
    }.items():
        pair = of(ours), of(theirs)
        gain = Estimate.of([mine - other for mine, other in zip(*(each["values"] for each in pair))])
        cells = [f"{each['mean']:.3f} ± {each['std']:.3f}" for each in pair]
        assert f"| {name} | {' | '.join(cells)} | {points(gain)} |" in lines


def test_the_figures_of_fifteen_tasks_are_those_of_their_runs() -> None:
    runs = [read_json(path) for path in sorted((ROOT / "bench/results/offline-15").glob("seed-*/metrics.json"))]
    assert len(runs) == 5
    summary = read_json(ROOT / "bench/results/offline-15/summary.json")
    assert summary == mean_and_spread(runs)
    unnamed, named = summary["class_incremental"], summary["task_adapter"]["average_accuracy"]
    marks, stranger = unnamed["baselines"], unnamed["unknown"]
    rows = {
        "each task with its stored adapter": [named],
        "linear probe, tuned, on the same examples": [summary["baselines"]["linear_probe"]["average_accuracy"]],
        "all tasks under the live queue": [summary["live_queue"]["average_accuracy"]],
        "task not named: inferred, then its adapter": _found(unnamed["adapters"]),
        "the classifier that infers it, alone": _found(unnamed["closed_form"]),
        "nearest class mean": _found(marks["nearest_class_mean"]),
        "logistic regression on all tasks' examples at once": _found(marks["joint_regression"]),
    }
    page = (DOCS / "demo.md").read_text()
    fifteen = page[page.index("## Fifteen tasks") :]
    for name, spreads in rows.items():
        shown = next(line for line in fifteen.splitlines() if line.startswith(f"| {name} |"))
        wanted = [f"{spread['mean']:.3f} ± {spread['std']:.3f}" for spread in spreads]
        assert re.findall(r"\d\.\d{3} ± \d\.\d{3}", shown) == wanted
    text = " ".join(fifteen.split())
    page = (DOCS / "recipes/task-inference.md").read_text()
    assert f"accuracy is {unnamed['adapters']['average_accuracy']['mean']:.3f} among 52 classes" in page
    for said in (
        f"of {unnamed['adapters']['task_found']['mean']:.1%} of the texts",
        f"an AUROC of {stranger['mean_auroc']['mean']:.3f} ± {stranger['mean_auroc']['std']:.3f}",
        f"gives {stranger['false_alarms']['mean']:.1%} ({min(stranger['false_alarms']['values']):.1%} to "
        f"{max(stranger['false_alarms']['values']):.1%}) here, and notices {stranger['mean_detected']['mean']:.1%}",
        f"differs by {unnamed['calibration']['error']['mean']:.3f} ± {unnamed['calibration']['error']['std']:.3f}",
    ):
        assert said in text, said


def _found(result: dict[str, Any]) -> list[dict[str, float]]:
    return [result["task_found"], result["average_accuracy"]]
