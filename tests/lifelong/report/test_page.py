import base64
import io
import re
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread

from qtuning_fast.lifelong.metrics import mean_and_spread
from qtuning_fast.lifelong.report.page import PLOTS, write_report, write_seeds_report

HOSTILE = ["<script>alert(1)</script>", "a & b", "$\\frac{1}$", "_hidden", '"><img src=x>', "two\nlines", "x" * 300]
ALL_PICTURES = {picture.name for section in PLOTS.values() for picture in section}
EVICTION_PICTURES = {"queue-spectrum", "queue-energy"}
UNNAMED_PICTURES = {picture.name for picture in PLOTS["Without the task's name"]}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def links(self):
        return [attrs[key] for _, attrs in self.tags for key in ("src", "href") if key in attrs]

    def images(self):
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


def assert_self_contained(page):
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [link for link in page.links() if re.match(r"\w+://|//", link)]
    assert all(source.startswith("data:image/png;base64,") for source in page.images())


def assert_pictures_are_real(page, folder):
    """Each embedded picture decodes, shows something, and lies in plots/ as well."""
    files = {path.read_bytes() for path in (folder / "plots").glob("*.png")}
    embedded = [base64.b64decode(source.split(",", 1)[1]) for source in page.images()]
    assert set(embedded) == files
    for content in embedded:
        assert imread(io.BytesIO(content), format="png")[..., :3].var() > 1e-4


def drawn(folder):
    return {path.stem for path in (folder / "plots").glob("*.png")}


@pytest.mark.parametrize(
    ("tasks", "missing"),
    [
        (
            1,
            EVICTION_PICTURES
            | UNNAMED_PICTURES
            | {"row-weights", "accuracy-over-time", "starts"}
            | {n for n in ALL_PICTURES if "matrix" in n},
        ),
        (2, EVICTION_PICTURES),
        (5, set()),
        (70, set()),
    ],
)
def test_report_of_a_stream(make_metrics, tmp_path, tasks, missing):
    path = write_report(make_metrics(tasks), tmp_path / "run")
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    assert drawn(tmp_path / "run") == ALL_PICTURES - missing
    assert page.text.count("no eviction on record") == len(EVICTION_PICTURES & missing)
    assert_self_contained(page)
    assert_pictures_are_real(page, tmp_path / "run")


def test_headline_and_table_hold_the_numbers(make_metrics, tmp_path):
    metrics = make_metrics(5)
    page = Page(write_report(metrics, tmp_path))
    for result in (metrics["task_adapter"], metrics["live_queue"], metrics["baselines"]["linear_probe"]):
        assert f"{result['average_accuracy']:.3f}" in page.text
    for task in metrics["per_task"]:
        assert task["name"] in page.text
        assert f"{1000 * task['step_seconds']:.1f}" in page.text
    assert "training.few_shot.per_class" in page.text
    assert "forward transfer" not in page.text
    metrics["task_adapter"]["forward_transfer"] = 0.123
    assert "0.123" in Page(write_report(metrics, tmp_path)).text


def test_answers_without_the_name_have_their_table(make_metrics, tmp_path):
    metrics = make_metrics(5)
    block = metrics["class_incremental"]
    page = Page(write_report(metrics, tmp_path))
    measures = ("task_found", "average_accuracy", "cumulative_average_accuracy", "forgetting", "label_accuracy")
    for name, result in {
        "adapters": block["adapters"],
        "closed form": block["closed_form"],
        "nearest class mean": block["baselines"]["nearest_class_mean"],
    }.items():
        assert name + "".join(f"{result[measure]:.3f}" for measure in measures) in page.text
    joint = block["baselines"]["joint_regression"]
    assert f"joint regression{joint['task_found']:.3f}{joint['average_accuracy']:.3f}–––" in page.text
    assert f"adapters, task named–{metrics['task_adapter']['average_accuracy']:.3f}" in page.text
    text = " ".join(page.text.split())
    assert "(20 of them)" in text and "The rule that infers the task here: closed-form." in text
    assert "a share of 0.013 is said to be of no known task, where 0.010 is promised" in text
    assert "sharedbpediasst20.135" in page.text.replace("\n", "").replace(" ", ""), (
        "the largest confusion stands first in its table"
    )


def test_the_methods_own_answers_stand_out(make_metrics, tmp_path):
    metrics = make_metrics(3)
    block = metrics["class_incremental"]
    block["joint_head"] = {**block["adapters"], "average_accuracy": 0.123}
    metrics["config"]["answered_by"] = "joint_head"
    text = write_report(metrics, tmp_path).read_text()
    assert "answers by joint head reach an" in " ".join(text.split()) and "0.123, and the task is" in text
    assert '<tr class="mine"><th>joint head</th>' in text and text.count('class="mine"') == 1
    assert 'class="mine"' not in write_report(make_metrics(3), tmp_path / "other").read_text()


def test_a_run_of_an_earlier_version_says_so_once(make_metrics, tmp_path):
    write_report(make_metrics(2), tmp_path)
    page = Page(write_report(make_metrics(2, class_incremental=False), tmp_path))
    assert page.text.count("This run was not evaluated without the names of the tasks.") == 1
    assert drawn(tmp_path) == ALL_PICTURES - UNNAMED_PICTURES - EVICTION_PICTURES
    assert "When the task is not named" not in page.text and "task found" not in page.text


def test_one_task_has_a_table_and_one_sentence_for_the_plots(make_metrics, tmp_path):
    page = Page(write_report(make_metrics(1), tmp_path))
    assert page.text.count("There was one task only") == 1
    text = " ".join(page.text.split())
    assert "All classes of all 1 task compete" in text and "AUROC" not in text
    assert "0.010 is promised." in text


def test_without_a_threshold_nothing_is_promised(make_metrics, tmp_path):
    metrics = make_metrics(3)
    silent = {"threshold": None, "false_alarms": None, "detected": None, "mean_detected": None}
    metrics["class_incremental"]["unknown"].update(silent)
    text = " ".join(Page(write_report(metrics, tmp_path)).text.split())
    assert "no validation examples to set a threshold by" in text and "promised" not in text
    assert f"AUROC of {metrics['class_incremental']['unknown']['mean_auroc']:.3f} on average" in text


def test_no_gate_is_said_in_words(make_metrics, tmp_path):
    write_report(make_metrics(5), tmp_path)  # the pictures of an earlier report must not outlive it
    page = Page(write_report(make_metrics(5, gate=False), tmp_path))
    assert "Gate: this run has none." in page.text
    assert drawn(tmp_path) == ALL_PICTURES - {"gate"}


@pytest.mark.filterwarnings("error")
def test_hostile_names_are_shown_as_they_are(make_metrics, tmp_path):
    metrics = make_metrics(len(HOSTILE))
    metrics["tasks"] = HOSTILE
    for task, name in zip(metrics["per_task"], HOSTILE):
        task.update(name=name, label_names=[name, "other"])
    metrics["config"]["stream"] = "<b>stream</b>"
    page = Page(write_report(metrics, tmp_path))
    assert_self_contained(page)
    assert_pictures_are_real(page, tmp_path)
    for name in [*HOSTILE, "<b>stream</b>"]:
        assert name in page.text


def test_what_is_missing_is_left_out(tmp_path):
    metrics = {
        "tasks": ["a", "b"],
        "per_task": [{"name": "a"}, {"name": "b"}],
        "task_adapter": {"accuracy_matrix": [[0.5, None], [0.5, 0.6]], "average_accuracy": 0.55},
    }
    page = Page(write_report(metrics, tmp_path))
    assert drawn(tmp_path) == {"accuracy-over-time", "accuracy-by-task", "accuracy-matrix-task-adapter"}
    assert "this run was not evaluated that way" in page.text


def test_seeds_report_links_to_each_seed(make_metrics, tmp_path):
    runs = [make_metrics(4, seed) for seed in (3, 8)]
    summary = mean_and_spread(runs)
    page = Page(write_seeds_report(runs, summary, tmp_path))
    assert_self_contained(page)
    assert_pictures_are_real(page, tmp_path)
    assert [link for link in page.links() if link.endswith(".html")] == ["seed-3/report.html", "seed-8/report.html"]
    spread = summary["live_queue"]["average_accuracy"]
    text = " ".join(page.text.split())
    assert f"{spread['mean']:.3f} ± {spread['std']:.3f}" in text
    unnamed = summary["class_incremental"]
    for measures in (unnamed["closed_form"], unnamed["baselines"]["joint_regression"], unnamed["calibration"]):
        for spread in measures.values():
            assert f"{spread['mean']:.3f} ± {spread['std']:.3f}" in text
    earlier = [make_metrics(4, class_incremental=False)]
    text = Page(write_seeds_report(earlier, mean_and_spread(earlier), tmp_path)).text
    assert "Without the task's name" not in text


def test_other_measures_are_named(make_metrics, tmp_path):
    metrics = make_metrics(3, class_incremental=False)
    for task, metric in zip(metrics["per_task"], ("accuracy", "micro_f1", "pearson")):
        task["metric"] = metric
    metrics["baselines"]["linear_probe"]["accuracy"][2] = -0.5  # a correlation
    page = Page(write_report(metrics, tmp_path / "mixed"))
    for said in ("average score", "micro-F1", "correlation", "measure"):
        assert said in page.text
    assert "average accuracy" not in page.text
    for task in metrics["per_task"]:
        task["metric"] = "micro_f1"
    page = Page(write_report(metrics, tmp_path / "alike"))
    assert "average micro-F1" in page.text and "ccuracy" not in page.text
    text = Page(write_seeds_report([metrics], mean_and_spread([metrics]), tmp_path / "seeds")).text
    assert "average micro-F1" in text and "ccuracy" not in text
