"""Data sets of the hub: what is missing or unreachable is said at once; local copies of two kinds."""

from __future__ import annotations

from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
from datasets import Dataset, DatasetDict

from qtuning_fast.lifelong.data import hub
from qtuning_fast.lifelong.data.hub import load_hub, load_local_copy


def data(**splits: int) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict({"text": ["a"] * count}) for name, count in splits.items()})


def test_copies_of_both_kinds(tmp_path: Path) -> None:
    made = data(train=3, dev=2)
    made.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "files").mkdir()
    for split, name in (("train", "train"), ("dev", "validation")):
        made[split].to_json(str(tmp_path / "files" / f"{name}.jsonl"))
    for kind in ("saved", "files"):
        found = load_local_copy(tmp_path / kind)
        assert {split: len(each) for split, each in found.items()} == {"train": 3, "validation": 2}


def test_a_split_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: data(train=1, extra=1))
    with pytest.warns(UserWarning, match="mine: not used: extra"):
        assert [*load_hub("mine")] == ["train"]
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: data(whole=1))
    assert [*load_hub("mine")] == ["whole"]


@pytest.mark.parametrize("reaches", [True, False])
def test_without_a_network_it_fails_at_once(reaches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(request: object, timeout: float) -> None:
        raise HTTPError("", 404, "", None, None) if reaches else URLError("no route")  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "urlopen", urlopen)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: data(train=1))
    if reaches:
        assert load_hub("mine")
        return
    with pytest.raises(ConnectionError, match=r"mine is not a local path, and the hub at .* cannot be reached"):
        load_hub("mine")
