"""Checkpoints on disk: what the version before wrote is read, what no version knows is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model.checked_files import CorruptFileError, read_json, write_json
from qtuning_fast.model.checkpoint import CONFIG_FILE, FORMAT_VERSION, READABLE_VERSIONS, read_checkpoint

FORMAT_3 = Path(__file__).parent / "format-3"  # three tasks, the third after an eviction, written by that version
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture
def base() -> BertModel:
    """The base model of `format-3`. Its weights are exact in every precision."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=11, max_position_embeddings=16))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            parameter.copy_((steps * (number + 2) % 11 - 5) / 16)
    return model.eval()


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMAT_3, tmp_path / "older"))


@torch.no_grad()
def logits(model: QTuningModel, task: str, *, live: bool = False) -> torch.Tensor:
    model.set_task(task, live=live)
    return model.eval()(input_ids=IDS).logits


def check(model: QTuningModel, expected: dict[str, torch.Tensor]) -> None:
    for task in ("first", "second", "third"):
        torch.testing.assert_close(logits(model, task), expected[task])
        torch.testing.assert_close(logits(model, task, live=True), expected[f"{task}.live"])
    for name, state in model.training_prefix.queue.state_dict().items():
        assert torch.equal(state, expected[f"queue.{name}"])


def test_a_checkpoint_of_the_format_before_computes_the_same(base: BertModel, older: Path, tmp_path: Path) -> None:
    assert read_json(older / CONFIG_FILE)["format_version"] == 3 == FORMAT_VERSION - 1
    expected = load_file(older / "expected.safetensors")
    model = QTuningModel.from_pretrained(base, older)
    check(model, expected)
    model.set_task(None)
    model.save_pretrained(tmp_path / "newer")
    assert read_json(tmp_path / "newer" / CONFIG_FILE)["format_version"] == FORMAT_VERSION
    model = QTuningModel.from_pretrained(model.detach(), tmp_path / "newer", lazy=True)
    check(model, expected)


def test_a_run_goes_on_from_the_format_before(base: BertModel, older: Path) -> None:
    model = QTuningModel.from_pretrained(base, older)
    model.start_task("fourth", 2)
    model.train()
    assert model(input_ids=IDS, labels=torch.tensor([0, 1])).retention_loss is not None  # held against the third
    model.finish_task()
    assert model.tasks == ["first", "second", "third", "fourth"]


@pytest.mark.parametrize("version", [None, 2, FORMAT_VERSION + 1, "4"])
def test_other_formats_are_refused(older: Path, version: object) -> None:
    content = read_json(older / CONFIG_FILE)
    write_json(older / CONFIG_FILE, content | {"format_version": version})
    with pytest.raises(ValueError, match=f"format version {version}; this version of qtuning_fast reads 3 and 4"):
        read_checkpoint(older)
    assert READABLE_VERSIONS == (3, FORMAT_VERSION)


def test_the_index_is_written_last_and_names_every_file(base: BertModel, tmp_path: Path) -> None:
    model = QTuningModel(base, QTuningConfig(prompt_length=2, shared_length=1, reparameterization=None))
    model.start_task("only", 2)
    model.finish_task()
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / CONFIG_FILE).read_text())
    named = {index["state"]["file"], *(task["file"] for task in index["tasks"])}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named
    (tmp_path / index["state"]["file"]).unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        read_checkpoint(tmp_path)
