"""A user's own data: every kind of file, every kind of label, and everything that can be wrong with them."""

import json
import os
import subprocess
import sys
from collections import Counter

import datasets
import pytest

from qtuning_fast.lifelong.data.loading import load_examples, load_task
from qtuning_fast.lifelong.data.tables import DataWarning

ROWS = [{"text": f"text {number}, number {number % 3}", "label": ("bad", "good")[number % 2]} for number in range(60)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path, rows=ROWS):
    data = datasets.Dataset.from_list(rows)
    match path.suffix.lower():
        case ".csv":
            data.to_csv(path)
        case ".tsv":
            data.to_csv(path, sep="\t")
        case ".parquet":
            data.to_parquet(path)
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        case ".json":
            path.write_text(json.dumps(rows))
    return str(path)


def labelled(labels, column="label"):
    return [{"text": f"text {number}", column: label} for number, label in enumerate(labels)]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet", ".CSV"])
def test_files(tmp_path, ending):
    task = load_task("mine=" + write(tmp_path / f"some[1]*data{ending}"))
    assert task.name == "mine" and task.label_names == ["bad", "good"] and task.source.endswith(ending)
    assert Counter(task.validation.labels) == Counter(task.test.labels) == {0: 6, 1: 6}
    assert Counter(task.train.labels) == {0: 18, 1: 18}
    wanted = {row["text"]: row["label"] for row in ROWS}
    for part in (task.train, task.validation, task.test):
        assert all(wanted[text] == task.label_names[label] for text, label in zip(part.inputs, part.labels))


def test_shots_and_name(tmp_path):
    path = write(tmp_path / "reviews.csv")
    task = load_task(path, shots=5, validation_shots=4, test_size=10)
    assert task.name == "reviews"
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 8, 10)
    assert task != load_task(path, shots=5, validation_shots=4, test_size=10, seed=1)


def test_folder_with_its_own_splits(tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    write(folder / "train.csv")
    write(folder / "validation.jsonl", ROWS[:4])
    write(folder / "test.parquet", [{"text": "unseen", "label": "good"}, ROWS[5]])
    task = load_task(str(folder))
    assert task.name == "a=b" and set(task.test.inputs) == {"unseen", ROWS[5]["text"]}
    assert set(task.validation.inputs) == {row["text"] for row in ROWS[:4]}
    assert set(task.train.inputs) == {row["text"] for row in ROWS[4:]} - {ROWS[5]["text"]}


def test_missing_splits_are_cut_from_train(tmp_path):
    write(tmp_path / "train.tsv")
    write(tmp_path / "test.tsv", [{"text": "unseen", "label": "good"}])
    task = load_task(str(tmp_path))
    assert task.test.inputs == ["unseen"] and len(task.validation) == 12 and len(task.train) == 48


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9, 2] * 10, ["2", "9", "10"]),
        ([True, False] * 10, ["False", "True"]),
        (["None", "null", "NA"] * 10, ["NA", "None", "null"]),
    ],
)
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_kinds_of_labels(tmp_path, labels, names, ending):
    task = load_task(write(tmp_path / f"data{ending}", labelled(labels, "kind")), label_column="kind")
    if ending == ".jsonl" and labels[0] is True:  # JSON writes them small
        labels, names = ["true" if label else "false" for label in labels], ["false", "true"]
    assert task.label_names == names
    texts = dict(zip(task.train.inputs, task.train.labels))
    assert all(str(labels[int(text.split()[1])]) == names[label] for text, label in texts.items())


def class_labels(values, names=("no", "yes")):
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(names)))
    return datasets.Dataset.from_list(labelled(values), features=features)


def test_class_labels_keep_their_order(tmp_path):
    class_labels([0, 1] * 10, ["zero", "one"]).to_parquet(tmp_path / "data.parquet")
    assert load_task(str(tmp_path / "data.parquet")).label_names == ["zero", "one"]
    class_labels([0, 1] * 10, ["zero", "one", "two"]).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(ValueError, match="task 'more': class 'two' has 0 different texts"):
        load_task(str(tmp_path / "more.parquet"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "x", "label": 1}], r"train of .*data.jsonl: there is no column 'text', only 'body', 'label'"),
        ([{"text": "x", "class": 1}], r"train of .*data.jsonl: there is no column 'label', only 'text', 'class'"),
        ([*ROWS, {"text": None, "label": "bad"}], r"column 'text' is empty in 1 of 61 rows, first in row 61"),
        ([*ROWS, {"text": " ", "label": "bad"}], r"column 'text' is empty in 1 of 61 rows, first in row 61"),
        ([{"text": "x", "label": None}, *ROWS], r"column 'label' is empty in 1 of 61 rows, first in row 1"),
        (
            [{"text": 3, "label": "a"}, {"text": 4, "label": "b"}],
            r"column 'text' in row 1 holds 3, an integer, but it must be a string",
        ),
        (
            [{"text": ["x"], "label": "a"}],
            r"column 'text' in row 1 holds \['x'\], of the kind list, but it must be a string",
        ),
        (
            labelled([0.5, 1.5] * 9),
            r"column 'label' in row 1 holds 0.5, a number with a fraction, but labels must be strings, integers",
        ),
        (
            labelled(["a", 1] * 9),
            r"column 'label' in row 2 holds 1, an integer, but in row 1 'a', a string; write all labels in one way",
        ),
        (labelled(["a"] * 9), r"task 'data': a task needs at least two classes, but it has \['a'\]"),
        (labelled(["a"] * 9 + ["b"]), r"task 'data': class 'b' has 1 different texts, but 3 are needed"),
    ],
)
def test_unusable_rows(tmp_path, rows, message):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_empty_files(tmp_path, ending):
    (tmp_path / f"data{ending}").touch()
    with pytest.raises(ValueError, match=rf"data{ending} is empty"):
        load_task(str(tmp_path / f"data{ending}"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("head.csv", b"text,label\n", "head.csv has no rows"),
        ("blank.csv", b"\n\n", "blank.csv has only blank lines"),
        (
            "ragged.csv",
            b"text,label\na,b\na,b,c,d\n",
            r"ragged.csv: the header has 2 columns, but row 2 \(line 3\) has 4 cells; put a text",
        ),
        (
            "latin.csv",
            b"text,label\ncaf\xe9,b\n",
            r"latin.csv is not UTF-8: byte 0xe9 at offset 14 \(line 2\).* iconv -f",
        ),
        ("short.csv", b"text,label\na,b\nc\n", r"the header has 2 columns, but row 2 \(line 3\) has 1 cell;"),
        (
            "broken.jsonl",
            b'{"text": "a", "label": 1}\n{"te\n',
            "broken.jsonl, line 2, cannot be read as JSON: Unterminated",
        ),
        ("broken.json", b'[{"text": "a", "label"', "broken.json, line 1, cannot be read as JSON"),
        ("blank.jsonl", b"\n", "blank.jsonl has no rows"),
        ("none.json", b"[]", "none.json has no rows"),
        ("number.json", b"3", "number.json: row 1 is 3, but each row must be an object"),
        ("broken.parquet", b"not parquet at all", "broken.parquet cannot be read as Parquet"),
        ("data.xlsx", b"x", r"data.xlsx ends in '.xlsx'; the endings that can be read are .csv, .tsv, .json"),
        ("data", b"x", r"data ends in ''; the endings that can be read"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / name))


def test_a_label_that_train_has_not(tmp_path):
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv", labelled(["bad", "ugly"]))
    with pytest.raises(ValueError, match=r"test of .*: label 'ugly' does not occur in train, .* \['bad', 'good'\]"):
        load_task(str(tmp_path))


def test_one_of_many_labels_that_train_has_not(tmp_path):
    write(tmp_path / "train.csv", labelled([f"class {number:02d}" for number in range(40)] * 3))
    write(tmp_path / "test.csv", labelled(["ugly"]))
    with pytest.raises(ValueError, match=r"train, which has \['class 00', .*, 'class 09' and 30 more\]; it is in"):
        load_task(str(tmp_path))


def test_a_test_split_that_is_the_training_split(tmp_path):
    write(tmp_path / "train.csv")
    write(tmp_path / "test.csv")
    with pytest.raises(
        ValueError, match="class 'bad' has 0 different texts that are in no other split, but 2 are needed"
    ):
        load_task(str(tmp_path))


def test_columns_that_cannot_be_told_apart(tmp_path):
    path = write(tmp_path / "data.csv")
    for load in (load_task, lambda path, **columns: load_examples(path, ["bad", "good"], **columns)):
        with pytest.raises(ValueError, match="text_column and label_column are both 'label'"):
            load(path, text_column="label")
    (tmp_path / "data.csv").write_text(",label,\nx,good,y\n")
    with pytest.raises(ValueError, match="several columns have the name ''; rename all but one"):
        load_task(path, text_column="")


def test_a_name_that_is_not_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"\xff.csv")
    write(file)
    with pytest.raises(ValueError, match=r"'\\udcff' cannot name a task, because it is not UTF-8; write a name"):
        load_task(str(file))
    assert load_task(f"mine={file}").name == "mine"


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no file train.*it holds nothing"):
        load_task(str(tmp_path))
    write(tmp_path / "test.csv")
    with pytest.raises(FileNotFoundError, match=r"has no file train.*it holds test.csv"):
        load_task(str(tmp_path))
    write(tmp_path / "train.csv")
    write(tmp_path / "train.tsv")
    with pytest.raises(ValueError, match=r"several files for train: train.csv, train.tsv"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["none.csv", "./none", "../none", "~/none", "/none", "a/b/none", "none.jsonl", "here/none"]
)
def test_a_slip_in_a_path_does_not_go_to_the_network(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://no-such-host.invalid")
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_task(f"mine={path}")


@pytest.mark.parametrize("spec", ["", "=", "mine=", "=data.csv"])
def test_specs_that_name_nothing(spec):
    with pytest.raises(ValueError, match="is not a task"):
        load_task(spec)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=r"org/none:config is not a local path, and the hub at http://127\S+ cannot"
    ):
        load_task("mine=org/none:config")


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set, `org/set:config`."""

    def load_dataset(name, config):
        if (name, config) != ("org/set", "config"):
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist")
        return datasets.DatasetDict(train=class_labels([0, 1] * 20), test=class_labels([-1] * 9))

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub(hub):
    with pytest.warns(DataWarning, match="^test of org/set:config: not used, because its labels are all -1"):
        task = load_task("org/set:config")
    assert task.name == "set" and task.label_names == ["no", "yes"] and task.source == "org/set:config"
    assert Counter(task.test.labels) == {0: 4, 1: 4}, "its test labels are secret: a test set is cut from train"
    with pytest.raises(
        ValueError, match=r"other is not a local path, and cannot be loaded from the hub: .*'other' doesn't"
    ):
        load_task("mine=other")


def test_a_hub_set_that_was_never_fetched(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="org/none is not a local path, and cannot be fetched from the hub"):
        load_task("org/none")


def test_files_need_no_package_datasets_and_the_hub_says_so(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"data{ending}") for ending in (".csv", ".jsonl", ".parquet")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert all(load_task(path).label_names == ["bad", "good"] for path in paths)
    with pytest.raises(ImportError, match=r"org/set is not a local path.*pip install datasets"):
        load_task("org/set")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        load_task(paths[-1])


def test_datasets_is_not_imported_before_it_is_needed():
    code = "import sys, qtuning_fast.lifelong.data.loading; print('datasets' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


SETS = [["red", "blue"], [], ["blue"], ["green"]] * 15


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet", "ClassLabel.parquet"])
def test_several_labels_a_text(tmp_path, ending):
    path = tmp_path / f"topics{ending}"
    names = ["red", "green", "blue"] if ending.startswith("ClassLabel") else ["blue", "green", "red"]
    if ending in (".csv", ".tsv"):
        write(path, labelled([";".join(labels) for labels in SETS], "labels"))
    elif ending.startswith("ClassLabel"):
        kinds = {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=names))}
        rows = labelled([[names.index(label) for label in labels] for labels in SETS], "labels")
        datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).to_parquet(path)
    else:
        write(path, labelled(SETS, "labels"))
    given = {"label_column": "labels", "problem_type": "multi_label_classification"}
    task = load_task(str(path), shots=20, validation_shots=10, **given)
    assert task.label_names == names and (len(task.train), len(task.validation)) == (20, 10)
    examples = load_examples(str(path), names, **given)
    assert [{name for name, there in zip(names, label) if there} for label in examples.labels] == list(map(set, SETS))
    with pytest.raises(
        ValueError, match=r"label 'blue' is not a label of the task, which has red, green; it is in row 1"
    ):
        load_examples(str(path), ["red", "green"], **given)


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_number_as_label(tmp_path, ending):
    path = write(tmp_path / f"stars{ending}", labelled([number / 2 for number in range(60)], "stars"))
    given = {"label_column": "stars", "problem_type": "regression"}
    task = load_task(path, shots=20, validation_shots=10, **given)
    assert task.label_names == ["stars"] and (len(task.train), len(task.validation)) == (20, 10)
    assert load_examples(path, ["stars"], **given).labels == [number / 2 for number in range(60)]


def test_folders_of_images_have_one_class_an_image(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").touch()
    with pytest.raises(ValueError, match="problem_type='regression' does not fit"):
        load_task(str(tmp_path), problem_type="regression")
