import random
from pathlib import Path

import pytest
import torch

from qtuning_fast.model.checked_files import CorruptFileError, read_json, read_tensors, write_json, write_tensors


def test_json_goes_there_and_back(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "b": {"ü": "x"}}
    write_json(tmp_path / "new" / "a.json", content)
    assert read_json(tmp_path / "new" / "a.json") == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_json_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"value": 1, "text": "abc"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError, match=r"a\.json"):
            read_json(path)
    path.write_bytes(whole.replace(b"1", b"2", 1))
    with pytest.raises(CorruptFileError, match="checksum"):
        read_json(path)


def test_json_that_is_no_number_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tensors_with_any_bit_changed_are_refused(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor(3)}
    entry = write_tensors(tmp_path, "state", tensors)
    assert all(torch.equal(tensors[name], value) for name, value in read_tensors(tmp_path, entry).items())
    path = tmp_path / entry["file"]
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=entry["file"]):
            read_tensors(tmp_path, entry)
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match=entry["file"]):
        read_tensors(tmp_path, entry)


def test_an_entry_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    entry = write_tensors(tmp_path, "state", {"x": torch.ones(1)})
    (tmp_path / "inner").mkdir()
    with pytest.raises(CorruptFileError):
        read_tensors(tmp_path / "inner", {**entry, "file": f"../{entry['file']}"})


def test_a_file_larger_than_was_written_is_not_read(tmp_path: Path) -> None:
    entry = write_tensors(tmp_path, "state", {"x": torch.ones(100)})
    size = (tmp_path / entry["file"]).stat().st_size
    assert read_tensors(tmp_path, entry, most_bytes=size)
    with pytest.raises(CorruptFileError, match=f"has {size} bytes, and at most {size - 1} were written"):
        read_tensors(tmp_path, entry, most_bytes=size - 1)
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(CorruptFileError, match="at most 3 were written"):
        read_json(tmp_path / "a.json", most_bytes=3)


@pytest.mark.parametrize("entry", [{}, {"file": None}, {"file": ["a"], "sha256": ""}, {"file": "a.safetensors"}])
def test_an_entry_that_is_none_is_refused(tmp_path: Path, entry: dict) -> None:
    with pytest.raises(CorruptFileError, match="not the name of a tensor file"):
        read_tensors(tmp_path, entry)
