"""Models that are pushed to a hub, which stands in for the real one on localhost, and come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model import HubError
from qtuning_fast.model.checkpoint import CONFIG_FILE
from qtuning_fast.model.model_card import CARD_FILE

Batch = dict[str, torch.Tensor]
SMALL = QTuningConfig(prompt_length=2, queue_size=3, shared_length=1, reparameterization=None)


@pytest.fixture
def learned(tiny_bert: BertModel) -> QTuningModel:
    model = QTuningModel(tiny_bert, SMALL)
    for name in ("moods", "topics"):
        model.start_task(name, label_names=["a", "b"])
        model.finish_task()
    model.set_task(None)
    return model.eval()


@torch.no_grad()
def logits(model: QTuningModel, batch: Batch, task: str) -> torch.Tensor:
    model.set_task(task)
    found = model(**batch).logits
    model.set_task(None)
    return found


def test_what_is_pushed_comes_back_to_the_bit(hub: Any, learned: QTuningModel, batch: Batch) -> None:
    expected = {task: logits(learned, batch, task) for task in learned.tasks}
    queue = learned.training_prefix.queue.state_dict()
    commit = learned.push_to_hub("user/adapters")
    assert commit.commit_url.startswith(f"{hub.endpoint}/user/adapters/commit/")
    assert set(hub.files("user/adapters")) == {".gitattributes", CARD_FILE, CONFIG_FILE} | {
        name for name in hub.files("user/adapters") if name.endswith(".safetensors")
    }
    model = QTuningModel.from_pretrained(learned.detach(), "user/adapters").eval()
    assert model.tasks == ["moods", "topics"]
    assert all(torch.equal(logits(model, batch, task), x) for task, x in expected.items())
    again = model.training_prefix.queue.state_dict()
    assert queue.keys() == again.keys() and all(torch.equal(again[name], x) for name, x in queue.items())
    model.start_task("more", 2)  # learning goes on


def test_a_push_leaves_the_adapters_where_they_are(hub: Any, learned: QTuningModel, tmp_path: Path) -> None:
    learned.save_pretrained(tmp_path / "here")
    learned.push_to_hub("user/adapters")
    assert {entry.file.folder for entry in learned.adapters.entries()} == {(tmp_path / "here").resolve()}


def test_one_task_is_pushed_alone(hub: Any, learned: QTuningModel, batch: Batch) -> None:
    expected = logits(learned, batch, "topics")
    learned.push_to_hub("user/topics", task="topics")
    names = [name for name in hub.files("user/topics") if name.endswith(".safetensors")]
    assert [name.partition("-")[0] for name in names] == ["task"]
    with pytest.raises(ValueError, match="task 'nothing' is not among the finished tasks: moods, topics"):
        learned.push_to_hub("user/topics", task="nothing")
    base = learned.detach()
    model = QTuningModel.from_pretrained(base, "user/topics").eval()
    assert model.tasks == ["topics"] and torch.equal(logits(model, batch, "topics"), expected)
    model.start_task("more", 2)  # from an empty queue
    model.finish_task()
    model.set_task(None)
    model.detach()
    other = QTuningModel(base, SMALL).eval()
    other.load_task("user/topics", "topics")
    assert torch.equal(logits(other, batch, "topics"), expected)


def test_a_push_replaces_the_one_before_and_nothing_else(hub: Any, learned: QTuningModel) -> None:
    learned.push_to_hub("user/adapters")
    before = hub.files("user/adapters")
    before["notes.txt"] = before["state-notes.safetensors"] = b"the owner's own"
    learned.push_to_hub("user/adapters", task="moods", commit_message="Only moods")
    after = hub.files("user/adapters")
    assert sorted(set(before) - set(after)) == sorted(
        name for name in before if name.startswith(("task-001-", "state-")) and name != "state-notes.safetensors"
    )
    assert after["notes.txt"] and hub.repositories["user/adapters"].messages[-1] == "Only moods"


def test_the_same_again_makes_no_commit(hub: Any, learned: QTuningModel) -> None:
    first = learned.push_to_hub("user/adapters")
    assert learned.push_to_hub("user/adapters").oid == first.oid


def test_a_page_that_someone_wrote_stays(hub: Any, learned: QTuningModel) -> None:
    learned.push_to_hub("user/adapters", card_data={"license": "mit"})
    page = hub.files("user/adapters")[CARD_FILE].decode()
    assert "license: mit" in page and "- Adapters: mit." in page
    learned.push_to_hub("user/adapters", task="moods")
    assert hub.files("user/adapters")[CARD_FILE] != page.encode(), "one that nobody touched is written anew"
    hub.files("user/adapters")[CARD_FILE] = b"# Mine"
    learned.push_to_hub("user/adapters")
    assert hub.files("user/adapters")[CARD_FILE] == b"# Mine"


def test_a_branch_and_a_private_repository(hub: Any, learned: QTuningModel, monkeypatch: pytest.MonkeyPatch) -> None:
    learned.push_to_hub("user/secret", task="moods", private=True)
    learned.push_to_hub("user/secret", revision="two")
    assert hub.repositories["user/secret"].private and set(hub.repositories["user/secret"].refs) == {"main", "two"}
    base = learned.detach()
    for revision, tasks in (("main", ["moods"]), ("two", ["moods", "topics"]), (None, ["moods"])):
        model = QTuningModel.from_pretrained(base, "user/secret", revision=revision)
        assert model.tasks == tasks
        model.detach()
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    with pytest.raises(HubError, match=r"no repository user/secret on http://127\S+, or it is private"):
        QTuningModel.from_pretrained(base, "user/secret", force_download=True)
    again = QTuningModel.from_pretrained(base, "user/secret", force_download=True, token="hf_reader")
    assert again.tasks == ["moods"]


def test_a_pull_request_changes_nothing_yet(hub: Any, learned: QTuningModel, monkeypatch: pytest.MonkeyPatch) -> None:
    learned.push_to_hub("user/adapters")
    before = dict(hub.files("user/adapters"))
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    commit = learned.push_to_hub("user/adapters", task="topics", create_pr=True)
    assert commit.pr_url == f"{hub.endpoint}/user/adapters/discussions/1"
    assert hub.files("user/adapters") == before != hub.files("user/adapters", "refs/pr/1")


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        (None, "user/adapters", "takes no token from you, .* `hf auth login`"),
        ("hf_wrong", "user/adapters", "takes no token from you"),
        ("hf_reader", "user/adapters", "your token may not write to user/adapters"),
        ("hf_guest", "user/adapters", "your token may not write to user/adapters"),
    ],
)
def test_who_may_not_push_is_told_so(
    hub: Any, learned: QTuningModel, token: str | None, repo_id: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=said) as caught:
        learned.push_to_hub(repo_id, token=token)
    assert "\n" not in str(caught.value) and not hub.repositories


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "user/my adapters", "../x", "user/x--y", None, "https://hub/a/b"])
def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub: Any, learned: QTuningModel, repo_id: Any) -> None:
    with pytest.raises(ValueError, match="it must be user/name"):
        learned.push_to_hub(repo_id)
    assert not hub.asked


@pytest.mark.parametrize("path", ["/commit/", "/lfs/", "/preupload/"])
def test_a_push_that_breaks_off_leaves_what_was_there(hub: Any, learned: QTuningModel, path: str) -> None:
    learned.push_to_hub("user/adapters", task="moods")
    before = dict(hub.files("user/adapters"))
    hub.fail("PUT" if path == "/lfs/" else "POST", path, status=403)
    with pytest.raises(HubError, match="your token may not write"):
        learned.push_to_hub("user/adapters")
    assert hub.files("user/adapters") == before
    learned.push_to_hub("user/adapters")
    assert hub.files("user/adapters") != before


def test_a_disk_that_is_full_is_said_so(hub: Any, learned: QTuningModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/tmp/some/file")

    monkeypatch.setattr("qtuning_fast.model.checked_files.os.fsync", full)
    with pytest.raises(HubError, match="the disk is full for /tmp/some/file; make room"):
        learned.push_to_hub("user/adapters")
    assert not hub.repositories


def test_a_task_in_training_is_not_pushed(hub: Any, learned: QTuningModel) -> None:
    learned.start_task("more", 2)
    with pytest.raises(RuntimeError, match="'more' is in training"):
        learned.push_to_hub("user/adapters")
