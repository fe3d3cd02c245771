"""What is downloaded of a repository, and what is said if that fails."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.model import CorruptFileError, HubError, NotOnHubError
from qtuning_fast.model.checked_files import read_json, write_json
from qtuning_fast.model.checkpoint import CONFIG_FILE
from qtuning_fast.model.hub_files import DownloadOptions, HubFiles, located

SMALL = QTuningConfig(prompt_length=2, queue_size=3, shared_length=1, reparameterization=None)
REPO = "user/adapters"


@pytest.fixture
def pushed(hub: Any, tiny_bert: BertModel) -> BertModel:
    """A base model, for which three tasks were pushed."""
    model = QTuningModel(tiny_bert, SMALL)
    for name in ("moods", "topics", "spam"):
        model.start_task(name, 2)
        model.finish_task()
        model.record_statistics(name, [{"input_ids": torch.randint(5, 40, (6, 4)), "labels": torch.arange(6) % 2}])
    model.set_task(None)
    model.push_to_hub(REPO)
    hub.asked.clear()
    return model.detach()


def kinds(hub: Any) -> list[str]:
    """The files that were downloaded, without the hashes in their names."""
    return sorted(name.rpartition("-")[0] or name for name in hub.downloads())


def test_a_model_takes_the_files_that_its_index_names_and_no_other(hub: Any, pushed: BertModel) -> None:
    hub.files(REPO)["pytorch_model.bin"] = hub.files(REPO)["task-009-0123456789ab.safetensors"] = b"not asked for"
    QTuningModel.from_pretrained(pushed, REPO)
    adapters = [f"{kind}-00{n}" for kind in ("statistics", "task") for n in range(3)]
    assert kinds(hub) == [CONFIG_FILE, *sorted([*adapters, "state"])]
    assert hub.downloads()[0] == CONFIG_FILE


def test_one_task_takes_its_own_files(hub: Any, pushed: BertModel) -> None:
    model = QTuningModel(pushed, SMALL)
    model.load_task(REPO, "topics")
    assert kinds(hub) == [CONFIG_FILE, "statistics-001", "task-001"]
    assert model.tasks == ["topics"] == list(model.statistics)
    with pytest.raises(ValueError, match="task 'nothing' is not among those in user/adapters: moods, topics, spam"):
        model.load_task(REPO, "nothing")


def test_lazily_a_task_is_downloaded_when_it_is_first_needed(hub: Any, pushed: BertModel, tmp_path: Path) -> None:
    model = QTuningModel.from_pretrained(pushed, REPO, lazy=True)
    assert kinds(hub) == [CONFIG_FILE, "state"]
    model.set_task("spam")
    model.set_task("spam")
    assert kinds(hub) == [CONFIG_FILE, "state", "task-002"]
    model.set_task(None)
    model.save_pretrained(tmp_path)  # needs them all
    assert len(hub.downloads()) == 8 and len(list(tmp_path.glob("*.safetensors"))) == 7


def test_what_is_in_the_cache_is_not_downloaded_again(
    hub: Any, pushed: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    QTuningModel.from_pretrained(pushed, REPO).detach()
    hub.asked.clear()
    QTuningModel.from_pretrained(pushed, REPO).detach()
    assert not hub.downloads()
    QTuningModel.from_pretrained(pushed, REPO, local_files_only=True).detach()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.asked.clear()
    QTuningModel.from_pretrained(pushed, REPO).detach()
    assert not hub.asked
    for options, said in (({"cache_dir": tmp_path / "new"}, "HF_HUB_OFFLINE forbids"), ({}, "no-such")):
        with pytest.raises(FileNotFoundError, match=said):
            QTuningModel.from_pretrained(pushed, REPO if options else "user/no-such", **options)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    QTuningModel.from_pretrained(pushed, REPO, cache_dir=tmp_path / "new").detach()
    assert len(hub.downloads()) == 8
    QTuningModel.from_pretrained(pushed, REPO, force_download=True, lazy=True).set_task("moods")
    assert len(hub.downloads()) == 11


def test_without_a_network_an_incomplete_cache_is_said_to_be_so(
    hub: Any, pushed: BertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = QTuningModel.from_pretrained(pushed, REPO, lazy=True)
    lazy.detach()
    for options in ({"local_files_only": True}, {}):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not options)
        said = "local_files_only" if options else "HF_HUB_OFFLINE"
        with pytest.raises(HubError, match=said) as caught:
            QTuningModel.from_pretrained(pushed, REPO, **options)
        assert "\n" not in str(caught.value)


def test_a_folder_goes_before_a_repository(
    hub: Any, pushed: BertModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = QTuningModel.from_pretrained(pushed, REPO)
    model.save_pretrained("user/adapters", task="spam")
    model.detach()
    hub.asked.clear()
    here = QTuningModel.from_pretrained(pushed, REPO, revision="of no concern to a folder")
    assert here.tasks == ["spam"] and not hub.asked
    here.detach()
    shutil.rmtree("user")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        QTuningModel.from_pretrained(pushed, Path(REPO))


def test_what_is_neither_is_said_to_be_neither(hub: Any, pushed: BertModel) -> None:
    for name in ("runs/mine/adapter", "my adapters"):
        with pytest.raises(FileNotFoundError, match="is not a folder, nor the name of a repository"):
            QTuningModel.from_pretrained(pushed, name)
    assert not hub.asked
    said = "user/none is not a folder here. As a name on the hub: there is no repository user/none on "
    with pytest.raises(NotOnHubError, match=said):
        QTuningModel.from_pretrained(pushed, "user/none")
    with pytest.raises(TypeError, match="revison: no such option; there are revision, token"):
        QTuningModel.from_pretrained(pushed, REPO, revison="main")  # type: ignore[call-arg]


def test_a_revision_or_an_index_that_is_not_there(hub: Any, pushed: BertModel) -> None:
    with pytest.raises(NotOnHubError, match="user/adapters has no revision 'older'"):
        QTuningModel.from_pretrained(pushed, REPO, revision="older")
    hub.files(REPO).pop(CONFIG_FILE)
    with pytest.raises(NotOnHubError, match=r"holds no adapter_config\.json at this revision"):
        QTuningModel.from_pretrained(pushed, REPO)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, None, "or it is private and your token does not open it"),
        (403, None, "your token may not read user/adapters"),
        (403, "GatedRepo", "is granted by its owner: ask for it at http"),
        (404, "RepoNotFound", "there is no repository user/adapters"),
        (418, None, r"refuses \(418\)"),
    ],
)
def test_what_the_hub_answers_is_said_in_one_line(
    hub: Any, pushed: BertModel, status: int, code: str | None, said: str
) -> None:
    hub.fail("HEAD", "/resolve/", status=status, code=code, times=9)
    with pytest.raises(HubError, match=said) as caught:
        located(REPO)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_hub_that_is_not_there(hub: Any, pushed: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(HubError, match=f"the hub at {nowhere} cannot be reached"):
        located(REPO)
    with pytest.raises(HubError, match=f"the hub at {nowhere} cannot be reached"):
        QTuningModel(pushed, SMALL).push_to_hub(REPO)


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub: Any, pushed: BertModel) -> None:
    hub.fail("GET", "/cdn/", cut_after=100)
    model = QTuningModel.from_pretrained(pushed, REPO)
    assert model.tasks == ["moods", "topics", "spam"]
    assert len(hub.downloads()) == 9, "one of them in two parts"


def test_a_download_that_is_cut_again_and_again_leaves_nothing_that_looks_whole(
    hub: Any, pushed: BertModel, tmp_path: Path
) -> None:
    hub.fail("GET", "/cdn/", cut_after=0, times=100)
    with pytest.raises(HubError, match="broke off"):
        QTuningModel.from_pretrained(pushed, REPO)
    cached = [path for path in (tmp_path / "hub-cache").rglob("*.safetensors") if path.is_file()]
    assert not cached and not list((tmp_path / "hub-cache").rglob("*.incomplete"))
    hub.faults.clear()
    assert QTuningModel.from_pretrained(pushed, REPO).tasks == ["moods", "topics", "spam"]


def test_all_files_are_of_one_push(hub: Any, pushed: BertModel) -> None:
    lazy = QTuningModel.from_pretrained(pushed, REPO, lazy=True)
    before = lazy.adapters.entry("spam").file
    newer = QTuningModel.from_pretrained(copy.deepcopy(pushed), REPO)
    newer.push_to_hub(REPO, task="moods")
    lazy.set_task("spam")  # it is no longer on the branch
    assert before is not None and (before.folder / before.file).is_file()


def test_a_file_that_is_too_large_is_not_downloaded(hub: Any, pushed: BertModel) -> None:
    files = hub.files(REPO)
    [name] = [each for each in files if each.startswith("task-001-")]
    files[name] += bytes(2 << 20)
    with pytest.raises(CorruptFileError, match=rf"user/adapters/{name} is damaged: it has 2\d+ bytes, and at most"):
        QTuningModel.from_pretrained(pushed, REPO)
    assert hub.downloads() == [CONFIG_FILE]
    files[CONFIG_FILE] += b" " * (65 << 20)
    with pytest.raises(CorruptFileError, match=rf"user/adapters/{CONFIG_FILE} is damaged"):
        located(REPO, force_download=True)
    assert hub.downloads() == [CONFIG_FILE]


def test_a_file_that_is_another_is_refused(hub: Any, pushed: BertModel) -> None:
    files = hub.files(REPO)
    [name] = [each for each in files if each.startswith("task-001-")]
    files[name] = files[name][:-1] + b"x"
    with pytest.raises(CorruptFileError, match=rf"{name} is damaged: .* force_download=True"):
        QTuningModel.from_pretrained(pushed, REPO)
    files.pop(name)
    with pytest.raises(NotOnHubError, match=rf"user/adapters lacks {name}, which adapter_config\.json names"):
        QTuningModel.from_pretrained(pushed, REPO, force_download=True)


def test_an_index_names_no_file_outside(hub: Any, pushed: BertModel, tmp_path: Path) -> None:
    files = hub.files(REPO)
    (tmp_path / CONFIG_FILE).write_bytes(files[CONFIG_FILE])
    index = read_json(tmp_path / CONFIG_FILE)
    for name in ("../README.md", "README.md", "a/task-000-0123456789ab.safetensors", "weights.bin"):
        write_json(tmp_path / CONFIG_FILE, index | {"state": {"file": name, "sha256": "0" * 64}})
        files[CONFIG_FILE] = (tmp_path / CONFIG_FILE).read_bytes()
        hub.asked.clear()
        with pytest.raises(CorruptFileError, match="not the name of a tensor file"):
            QTuningModel.from_pretrained(pushed, REPO, force_download=True)
        assert hub.downloads() == [CONFIG_FILE]


def test_a_snapshot_in_the_cache_is_a_folder_as_any_other(hub: Any, pushed: BertModel) -> None:
    QTuningModel.from_pretrained(pushed, REPO).detach()
    snapshot = located(REPO).folder
    assert (snapshot / CONFIG_FILE).is_symlink()
    assert QTuningModel.from_pretrained(pushed, snapshot).tasks == ["moods", "topics", "spam"]


def test_a_token_that_was_given_as_text_is_in_no_pickle(hub: Any, pushed: BertModel) -> None:
    model = QTuningModel.from_pretrained(pushed, REPO, lazy=True, token="hf_reader")
    written = pickle.dumps(model)
    assert b"hf_reader" not in written and "hf_reader" not in repr(model.adapters.entries()[0].file)
    again = pickle.loads(written)
    again.set_task("spam")
    assert copy.deepcopy(model).adapters["moods"].name == "moods"


def test_options_are_those_of_the_files() -> None:
    assert DownloadOptions.__annotations__.keys() - {"revision"} <= HubFiles.__dataclass_fields__.keys()
