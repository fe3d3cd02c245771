"""The settings of a run: which values are refused, and which tasks they load."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtuning_fast.lifelong.options import DataOptions, TrainingOptions


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("steps", -1, ValueError),
        ("steps", 1.5, TypeError),
        ("prompt_rate", -1, ValueError),
        ("prompt_rate", float("nan"), ValueError),
        ("head_rate", "1", TypeError),
        ("patience", -1, ValueError),
        ("seed", True, TypeError),
    ],
)
def test_training_options_are_checked(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        TrainingOptions(**{field: value})  # type: ignore[arg-type]


def test_training_options_may_be_zero_where_that_means_something() -> None:
    options = TrainingOptions(patience=0, seed=0, head_rate=0)
    assert TrainingOptions(**options.to_dict()) == options


@pytest.mark.parametrize("both", [DataOptions(), DataOptions("offline-5", ("a.csv",))])
def test_either_a_stream_or_tasks(both: DataOptions) -> None:
    with pytest.raises(ValueError, match="either a stream or tasks of your own"):
        both.load()


def test_a_stream_has_no_columns() -> None:
    with pytest.raises(ValueError, match="label_column is 'class', but a stream has no columns"):
        DataOptions("offline-5", label_column="class").load()


def test_tasks_are_loaded_in_order(toy_files: dict[str, Path]) -> None:
    specs = tuple(f"{name}={path}" for name, path in toy_files.items())
    tasks = DataOptions(tasks=specs, shots=4, validation_shots=3, test_size=6).load()
    assert [task.name for task in tasks] == list(toy_files)
    assert all(len(task.train) == 4 * len(task.label_names) and len(task.test) == 6 for task in tasks)


def test_usual_columns_are_not_recorded() -> None:
    assert "text_column" not in DataOptions(tasks=("a.csv",)).to_dict()
    recorded = DataOptions(tasks=("a.csv",), label_column="class").to_dict()
    assert recorded["label_column"] == "class" and "text_column" not in recorded
    assert DataOptions.from_dict(recorded) == DataOptions(tasks=("a.csv",), label_column="class")


def test_tasks_have_their_problem_types(toy_files: dict[str, Path], tmp_path: Path) -> None:
    stars = tmp_path / "stars.csv"
    stars.write_text("text,label\n" + "\n".join(f"text {number},{number / 2}" for number in range(40)))
    specs, sizes = (f"colours={toy_files['colours']}", str(stars)), {"shots": 4, "validation_shots": 3, "test_size": 6}
    options = DataOptions(tasks=specs, **sizes, problem_types=("stars=regression",))
    assert [task.problem_type for task in options.load()] == ["single_label_classification", "regression"]
    assert [task.problem_type for task in DataOptions(tasks=specs[1:], **sizes, problem_types=("regression",)).load()]
    assert options.to_dict()["problem_types"] == ["stars=regression"]
    assert "problem_types" not in DataOptions(tasks=specs).to_dict()


@pytest.mark.parametrize(
    ("problem_types", "message"),
    [
        (("ranking",), "has 'ranking'; the types are single_label"),
        (("others=regression",), "has 'others=regression', but the tasks are colours"),
        (("regression", "colours=multi_label_classification"), "gives task 'colours' two types"),
    ],
)
def test_problem_types_are_checked(toy_files: dict[str, Path], problem_types: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataOptions(tasks=(str(toy_files["colours"]),), problem_types=problem_types).load()
    with pytest.raises(ValueError, match="a stream has its own"):
        DataOptions("offline-5", problem_types=problem_types).load()
