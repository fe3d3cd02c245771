import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtuning_fast.lifelong.metrics import (
    evaluation_summary,
    final_accuracies,
    in_words,
    mean_and_spread,
    measured,
    named_summary,
    start_in_words,
    unnamed_results,
)

MATRIX = [
    [0.8, None, None],
    [0.9, 0.6, None],
    [0.5, 0.7, 0.4],
]


def test_summary_of_a_hand_worked_matrix():
    summary = evaluation_summary(MATRIX)
    assert summary["accuracy_matrix"] == MATRIX
    assert summary["average_accuracy"] == pytest.approx((0.5 + 0.7 + 0.4) / 3)
    assert summary["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.7)) / 2)
    assert summary["backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.7 - 0.6)) / 2)
    assert summary["forward_transfer"] is None


def test_forward_transfer_skips_the_first_task_and_what_was_not_measured():
    assert evaluation_summary(MATRIX, alone=[0.1, 0.5, 0.6])["forward_transfer"] == pytest.approx((0.1 - 0.2) / 2)
    assert evaluation_summary(MATRIX, alone=[None, None, 0.6])["forward_transfer"] == pytest.approx(-0.2)
    assert evaluation_summary(MATRIX, alone=[0.1, None, None])["forward_transfer"] is None


def test_a_single_task_neither_forgets_nor_transfers():
    summary = evaluation_summary([[0.75]], alone=[0.5])
    assert summary == {
        "accuracy_matrix": [[0.75]],
        "average_accuracy": 0.75,
        "forgetting": 0.0,
        "backward_transfer": 0.0,
        "forward_transfer": None,
    }


@pytest.mark.parametrize(
    ("matrix", "complaint"),
    [
        ([], "square"),
        ([[0.5], [0.5, 0.5]], "square"),
        ([[0.5, 0.5], [0.5, 0.5]], "above the diagonal"),
        ([[0.5, None], [None, 0.5]], "fractions"),
        ([[83.0]], "fractions"),
    ],
)
def test_a_malformed_matrix_is_refused(matrix, complaint):
    with pytest.raises(ValueError, match=complaint):
        evaluation_summary(matrix)


def test_alone_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"alone must hold one entry per task \(3\), got 2"):
        evaluation_summary(MATRIX, alone=[None, 0.5])


fraction = st.floats(0, 1)
lower_triangle = st.integers(1, 8).flatmap(
    lambda tasks: st.tuples(
        *(
            st.lists(fraction, min_size=i + 1, max_size=i + 1).map(lambda row, t=tasks: row + [None] * (t - len(row)))
            for i in range(tasks)
        )
    )
)


@given(lower_triangle)
def test_forgetting_covers_what_was_lost_since_learning(matrix):
    summary = evaluation_summary(matrix)
    assert 0 <= summary["average_accuracy"] <= 1 + 1e-12
    assert -1 <= summary["backward_transfer"] <= 1
    assert summary["forgetting"] >= max(0, -summary["backward_transfer"]) - 1e-12


@given(st.lists(fraction, min_size=1, max_size=8))
def test_constant_columns_are_never_forgotten(learned):
    matrix = [[a if j <= i else None for j, a in enumerate(learned)] for i in range(len(learned))]
    summary = evaluation_summary(matrix, alone=learned)
    assert summary["forgetting"] == summary["backward_transfer"] == 0
    assert summary["forward_transfer"] in (0, None)


def test_final_accuracies_lists_evaluations_before_baselines(make_metrics):
    metrics = make_metrics(4)
    final = final_accuracies(metrics)
    assert list(final) == ["task_adapter", "live_queue", "linear_probe"]
    assert final["live_queue"] == metrics["live_queue"]["accuracy_matrix"][-1]
    assert final["linear_probe"] == metrics["baselines"]["linear_probe"]["accuracy"]
    del metrics["live_queue"], metrics["baselines"]
    assert list(final_accuracies(metrics)) == ["task_adapter"]


def test_mean_and_spread_over_seeds(make_metrics):
    runs = [make_metrics(3, seed) for seed in range(3)]
    summary = mean_and_spread(runs)
    values = [run["live_queue"]["forgetting"] for run in runs]
    mean = sum(values) / 3
    spread = summary["live_queue"]["forgetting"]
    assert spread["values"] == values
    assert spread["mean"] == pytest.approx(mean)
    assert spread["std"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 2))
    assert summary["task_adapter"]["forgetting"]["mean"] == 0
    assert len(summary["baselines"]["linear_probe"]["average_accuracy"]["values"]) == 3


def test_spread_of_answers_without_the_name(make_metrics):
    runs = [make_metrics(3, seed) for seed in range(3)]
    blocks = [run["class_incremental"] for run in runs]
    summary = mean_and_spread(runs)["class_incremental"]
    measures = {"task_found", "average_accuracy", "cumulative_average_accuracy", "forgetting", "label_accuracy"}
    for name in ("adapters", "closed_form"):
        assert summary[name].keys() == measures
        for measure, spread in summary[name].items():
            assert spread["values"] == [block[name][measure] for block in blocks]
    assert summary["baselines"]["nearest_class_mean"].keys() == measures
    assert summary["baselines"]["joint_regression"].keys() == {"task_found", "average_accuracy"}
    values = [block["baselines"]["joint_regression"]["task_found"] for block in blocks]
    assert summary["baselines"]["joint_regression"]["task_found"]["mean"] == pytest.approx(sum(values) / 3)
    assert summary["unknown"]["mean_auroc"]["values"] == [block["unknown"]["mean_auroc"] for block in blocks]
    assert summary["unknown"]["false_alarms"]["mean"] == pytest.approx(0.013)
    assert summary["calibration"]["error"]["values"] == [0.021] * 3


def test_a_number_that_one_run_lacks_has_no_spread(make_metrics):
    runs = [make_metrics(2, seed) for seed in range(2)]
    runs[1]["class_incremental"]["unknown"]["false_alarms"] = None
    unknown = mean_and_spread(runs)["class_incremental"]["unknown"]
    assert unknown["false_alarms"] is None and unknown["mean_auroc"] is not None
    assert mean_and_spread([make_metrics(1)])["class_incremental"]["unknown"]["mean_auroc"] is None


def test_runs_of_an_earlier_version_have_no_answers_without_the_name(make_metrics):
    earlier, later = make_metrics(2, class_incremental=False), make_metrics(2)
    assert "class_incremental" not in mean_and_spread([earlier])
    assert "class_incremental" not in mean_and_spread([later, earlier])
    assert unnamed_results(earlier) == {}
    assert list(unnamed_results(later)) == ["adapters", "closed_form", "nearest_class_mean", "joint_regression"]


def test_what_named_adapters_reach():
    assert named_summary({"tasks": ["a"]}) == {}
    named = named_summary({"task_adapter": evaluation_summary(MATRIX)})
    assert named["average_accuracy"] == pytest.approx((0.5 + 0.7 + 0.4) / 3)
    assert named["cumulative_average_accuracy"] == pytest.approx((0.8 + (0.9 + 0.6) / 2 + (0.5 + 0.7 + 0.4) / 3) / 3)


def test_one_run_has_no_spread(make_metrics):
    assert mean_and_spread([make_metrics(2)])["live_queue"]["average_accuracy"]["std"] is None
    with pytest.raises(ValueError, match="at least one run"):
        mean_and_spread([])


def test_a_correlation_may_be_negative() -> None:
    matrix = [[-0.5, None], [0.5, 1.0]]
    with pytest.raises(ValueError, match=r"fractions in \[0, 1\]"):
        evaluation_summary(matrix)
    assert evaluation_summary(matrix, least=-1.0)["average_accuracy"] == 0.75


def test_the_word_names_what_is_measured(make_metrics):
    metrics = make_metrics(3)
    assert measured(metrics) == "accuracy" and mean_and_spread([metrics])["metric"] == "accuracy"
    for task in metrics["per_task"]:
        task["metric"] = "micro_f1"
    assert measured(metrics) == "micro-F1" and in_words("average_accuracy", "micro-F1") == "average micro-F1"
    metrics["per_task"][0]["metric"] = "pearson"
    assert measured(metrics) == "score" and in_words("Accuracy by task", "score") == "Score by task"


def test_a_start_is_said_in_words():
    chosen = {"rows": "prompt", "donor": "films", "head": "closed-form", "mixed_with": ["films", "books"], "loss": 0.4}
    plain = {"rows": "random", "donor": None, "head": "random", "mixed_with": [], "loss": None}
    assert start_in_words({"chosen": chosen, "considered": [plain, chosen]}) == (
        "the prompt of films with a head in closed form, mixed with that of films and books (loss 0.400; 2 were tried)"
    )
    assert start_in_words({"chosen": plain, "considered": [plain]}) == "random rows with a random head"
    mean = plain | {"rows": "queue-mean", "head": None}
    assert start_in_words({"chosen": mean, "considered": [mean]}) == "the queue's mean"
