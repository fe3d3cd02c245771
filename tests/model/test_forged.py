"""Checkpoints from anybody: whatever is in their files, reading runs nothing, and what is wrong is refused by name.

Each change here comes with matching checksums, as one who means harm would write it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model import CorruptFileError
from qtuning_fast.model.checked_files import read_json, read_tensors, write_json, write_tensors
from qtuning_fast.model.checkpoint import CONFIG_FILE, MOST_INDEX_BYTES, read_checkpoint

EXAMPLES = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
HASH = "0123456789ab"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def a_base() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return BertModel(BertConfig(**sizes, vocab_size=11, max_position_embeddings=16)).eval()


@pytest.fixture
def base() -> BertModel:
    return a_base()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three tasks, after an eviction, with statistics."""
    folder = tmp_path_factory.mktemp("original")
    model = QTuningModel(
        a_base(), QTuningConfig(prompt_length=2, queue_size=2, shared_length=1, reparameterization=None)
    )
    for name in ("first", "second", "third"):
        model.start_task(name, 2)
        model.finish_task()
        labels = torch.arange(6) % 2
        model.record_statistics(name, [{"input_ids": torch.randint(11, (6, 4)), "labels": labels}])
    model.set_task(None)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def nodes(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all values in an index."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(each for key, value in inner for each in nodes(value, (*path, key)))][0 if path else 1 :]


def put(content: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def read(base: BertModel, folder: Path) -> None:
    """Read it in each way, and use what is lazy."""
    QTuningModel.from_pretrained(base, folder).detach()
    model = QTuningModel.from_pretrained(base, folder, lazy=True)
    try:
        for name in model.tasks:
            model.set_task(name)
        model.set_task(None)
        dict(model.statistics)
    finally:
        model.detach()


def test_it_is_read_as_it_is(base: BertModel, folder: Path) -> None:
    read(base, folder)


@EXAMPLES
@given(data=st.data())
def test_whatever_an_index_says_it_is_read_or_refused_by_name(
    base: BertModel, original: Path, folder: Path, data: st.DataObject
) -> None:
    index = read_json(original / CONFIG_FILE)
    place = data.draw(st.sampled_from(nodes(index)))
    put(index, place, data.draw(JSON))
    write_json(folder / CONFIG_FILE, index)
    try:
        read(base, folder)
    except ValueError as error:
        # Settings that are valid, but not with this model, are named by the model.
        named = str(folder) in str(error) or place[0] == "config"
        assert named, error


TENSORS = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)


def forge(folder: Path, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Let an entry of the index name a file with these tensors."""
    entry |= write_tensors(folder, entry["file"].rpartition("-")[0], tensors)
    entry["bytes"] = sum(x.nbytes for x in tensors.values())


def entries(index: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"adapter": index["tasks"][1], "statistics": index["tasks"][1]["statistics"], "state": index["state"]}


@EXAMPLES
@given(data=st.data(), kind=st.sampled_from(["adapter", "statistics", "state"]))
def test_whatever_a_file_of_tensors_holds_it_is_refused_by_name(
    base: BertModel, original: Path, folder: Path, data: st.DataObject, kind: str
) -> None:
    index = read_json(original / CONFIG_FILE)
    entry = entries(index)[kind]
    tensors = read_tensors(original, entry)
    name = data.draw(st.sampled_from(sorted(tensors)))
    what = data.draw(st.sampled_from(["other", "left out", "renamed", "one more"]))
    new = data.draw(TENSORS)
    before = tensors[name]
    if what == "other":
        tensors[name] = new
    elif what == "left out":
        del tensors[name]
    elif what == "renamed":
        tensors["0"] = tensors.pop(name)
    else:
        tensors["keys.7" if kind == "adapter" else "more.counts"] = new
    forge(folder, entry, tensors)
    write_json(folder / CONFIG_FILE, index)
    alike = what == "other" and (new.shape, new.dtype) == (before.shape, before.dtype) and new.isfinite().all()
    try:
        read(base, folder)
    except ValueError as error:
        assert entry["file"] in str(error) or str(folder) in str(error), error
    else:
        # Other numbers are another adapter; those of the state may have another precision.
        precision = kind == "state" and (new.shape, new.is_floating_point()) == (
            before.shape,
            before.is_floating_point(),
        )
        assert what == "other" and (alike or precision), (name, what, new)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["adapter", "statistics", "state"])
def test_numbers_that_are_none_are_refused(base: BertModel, folder: Path, kind: str, value: float) -> None:
    index = read_json(folder / CONFIG_FILE)
    entry = entries(index)[kind]
    tensors = read_tensors(folder, entry)
    name = {"adapter": "keys.0", "statistics": "features.means", "state": "queue.rows.0"}[kind]
    tensors[name].view(-1)[0] = value
    forge(folder, entry, tensors)
    write_json(folder / CONFIG_FILE, index)
    with pytest.raises(CorruptFileError, match=entry["file"]):
        QTuningModel.from_pretrained(base, folder)
    other = QTuningModel(base, QTuningConfig(prompt_length=2, queue_size=2, shared_length=1))
    if kind == "state":
        other.load_task(folder, "second")  # of one task nothing else is read
    else:
        with pytest.raises(CorruptFileError, match=entry["file"]):
            other.load_task(folder, "second")
        assert other.tasks == []
    other.detach()


@pytest.mark.parametrize("lazy", [False, True])
def test_tensors_of_another_size_are_refused_when_they_are_read(base: BertModel, folder: Path, lazy: bool) -> None:
    index = read_json(folder / CONFIG_FILE)
    entry = entries(index)["adapter"]
    tensors = {name: x.double() if name == "keys.1" else x for name, x in read_tensors(folder, entry).items()}
    tensors["keys.1"] = tensors["keys.1"][..., :-1]
    forge(folder, entry, tensors)
    write_json(folder / CONFIG_FILE, index)
    with pytest.raises(CorruptFileError, match=rf"{entry['file']}: .* keys\.1 is \[2, 5, 3\]; it must be \[2, 5, 4\]"):
        QTuningModel.from_pretrained(base, folder, lazy=lazy).set_task("second")


TRICKS = [
    f"../task-000-{HASH}.safetensors",
    f"/tmp/task-000-{HASH}.safetensors",
    f"inner/task-000-{HASH}.safetensors",
    f"..\\task-000-{HASH}.safetensors",
    f"C:\\task-000-{HASH}.safetensors",
    f"C:task-000-{HASH}.safetensors",
    f"task-000-{HASH}.safetensors\0",
    f"task\0-000-{HASH}.safetensors",
    f"task-000-{HASH}.safetensors\n",
    f"~/task-000-{HASH}.safetensors",
    f".task-000-{HASH}.safetensors",
    f"task-000-{HASH}.safetensors:stream",
    f"task-000-{HASH}.bin",
    "CON",
    "",
    ".",
    "..",
    CONFIG_FILE,
]


@EXAMPLES
@given(name=st.sampled_from(TRICKS) | st.text(max_size=40).filter(lambda text: HASH not in text) | JSON)
def test_a_name_leads_nowhere_else(folder: Path, name: Any) -> None:
    index = read_json(folder / CONFIG_FILE)
    for kind in ("adapter", "statistics", "state"):
        forged = json.loads(json.dumps(index))
        entries(forged)[kind]["file"] = name
        write_json(folder / "forged" / CONFIG_FILE, forged)
        with pytest.raises(CorruptFileError, match="not the name of a tensor file beside it"):
            read_checkpoint(folder / "forged", lazy=kind != "state")


@pytest.mark.parametrize("name", ["index", "adapter", "state"])
def test_a_link_out_of_the_folder_is_refused(base: BertModel, folder: Path, tmp_path: Path, name: str) -> None:
    index = read_json(folder / CONFIG_FILE)
    file = CONFIG_FILE if name == "index" else entries(index)[name]["file"]
    elsewhere = tmp_path / "elsewhere"
    (folder / file).rename(elsewhere)
    (folder / file).symlink_to(elsewhere)
    with pytest.raises(CorruptFileError, match=f"{file} is a link out of its folder"):
        QTuningModel.from_pretrained(base, folder)
    elsewhere.rename(folder / "beside")
    (folder / file).unlink()
    (folder / file).symlink_to("beside")  # within it
    read(base, folder)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    read(base, linked)


def test_a_pipe_is_no_file(base: BertModel, folder: Path) -> None:
    file = read_json(folder / CONFIG_FILE)["state"]["file"]
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(CorruptFileError, match=f"{file} is missing"):
        QTuningModel.from_pretrained(base, folder)


def test_files_that_are_too_large_are_not_read(base: BertModel, folder: Path) -> None:
    index = read_json(folder / CONFIG_FILE)
    for kind, said in (("state", ""), ("adapter", "the adapter of task 'second' cannot be read: ")):
        path = folder / entries(index)[kind]["file"]
        size = path.stat().st_size
        os.truncate(path, 1 << 40)  # a hole: it takes no room
        with pytest.raises(CorruptFileError, match=rf"^{said}.*{path.name} is damaged: it has 1099511627776 bytes"):
            QTuningModel.from_pretrained(base, folder)
        os.truncate(path, size)
    read(base, folder)
    os.truncate(folder / CONFIG_FILE, MOST_INDEX_BYTES + 1)
    with pytest.raises(CorruptFileError, match=f"{CONFIG_FILE} is damaged: it has"):
        QTuningModel.from_pretrained(base, folder)


@pytest.mark.parametrize("setting", ["prompt_length", "shared_length", "rank"])
@pytest.mark.parametrize("state", [True, False])
def test_a_config_cannot_ask_for_more_memory_than_there_is(
    base: BertModel, folder: Path, setting: str, state: bool
) -> None:
    index = read_json(folder / CONFIG_FILE)
    index["config"][setting] = 10**9
    index |= {} if state else {"state": None, "last_learned": None}
    write_json(folder / CONFIG_FILE, index)
    with pytest.raises(CorruptFileError, match=f"{CONFIG_FILE} is not an index of a saved model: {setting} is 10"):
        QTuningModel.from_pretrained(base, folder)
    index["config"][setting] = 10**4
    write_json(folder / CONFIG_FILE, index)
    if setting == "shared_length" and state:
        with pytest.raises(CorruptFileError, match="does not fit the config"):
            QTuningModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"checksum": "", "a": ' + "[" * 500 + "]" * 500 + "}",
        '{"checksum": "", "a": NaN}',
        '{"checksum": "", "a": 1e999}',
        '{"checksum": "", "a": ' + "9" * 10_000 + "}",
        '{"checksum": "", "a": "\\ud800"}',
        "\0" * 100,
        "null",
        '["checksum"]',
    ],
)
def test_json_that_is_a_trap_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / CONFIG_FILE
    path.write_text(text)
    with pytest.raises(CorruptFileError, match=f"{CONFIG_FILE} is damaged"):
        read_json(path)


@EXAMPLES
@given(content=st.binary(max_size=300))
def test_any_bytes_in_place_of_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(CorruptFileError, match=CONFIG_FILE):
        read_json(tmp_path / CONFIG_FILE)


def headed(header: Any, data: bytes = b"") -> bytes:
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + data


HEADERS = st.builds(
    headed,
    st.dictionaries(
        st.text(max_size=5),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "U16", "X"]),
                "shape": st.lists(st.integers(0, 2**62), max_size=3),
                "data_offsets": st.lists(st.integers(0, 2**62), min_size=2, max_size=2) | st.just([0, 0]),
            }
        )
        | JSON,
        max_size=3,
    )
    | JSON,
    st.binary(max_size=32),
)


@EXAMPLES
@given(content=st.binary(max_size=100) | HEADERS)
def test_any_bytes_in_place_of_tensors_are_read_as_tensors_or_refused(tmp_path: Path, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    name = f"state-{digest[:12]}.safetensors"
    (tmp_path / name).write_bytes(content)
    try:
        found = read_tensors(tmp_path, {"file": name, "sha256": digest})
    except CorruptFileError as error:
        assert name in str(error)
    else:
        assert safetensors.load(content).keys() == found.keys()


def test_no_file_is_unpickled(base: BertModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, fail)
    read(base, folder)
