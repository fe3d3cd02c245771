"""Share a run over the Hugging Face hub: push what `predict` and `eval` need of it, and pull it into a folder.

A repository has the files of the checkpoint, a model card, and `run.json` with the settings of the run. Paths of the
author's machine are not in it, nor are texts or images.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any, Unpack

from huggingface_hub import CommitInfo, EvalResult

from qtuning_fast.lifelong.data.tables import is_readable
from qtuning_fast.lifelong.joint_head import MOST_HEAD_BYTES, joint_head_file, read_joint_head
from qtuning_fast.lifelong.metrics import unnamed_results
from qtuning_fast.lifelong.options import DataOptions, TrainingOptions
from qtuning_fast.lifelong.run_folder import RUN_FILE
from qtuning_fast.lifelong.runs import METRICS_FILE
from qtuning_fast.lifelong.saved_run import SHARED, SHARED_HEAD, adapter_folder, run_folder
from qtuning_fast.lifelong.scores import WORDS
from qtuning_fast.lifelong.stream import MINILM
from qtuning_fast.method.config import HEAD_TASK_TYPES
from qtuning_fast.model.checked_files import CorruptFileError, check_link, checked_name, read_json, write_json
from qtuning_fast.model.checkpoint import CONFIG_FILE, Checkpoint, read_checkpoint, write_checkpoint
from qtuning_fast.model.hub import PushOptions, push_checkpoint
from qtuning_fast.model.hub_files import DownloadOptions, check_repo_id, hub_errors, on_hub
from qtuning_fast.model.model_card import CARD_FILE, PIPELINES, Asked, model_card, on_the_hub

_ABOUT = ("stream", "base_model", "method_name", "answered_by")
_METRIC_IDS = {"accuracy": "accuracy", "micro_f1": "f1", "pearson": "pearsonr"}  # as the hub calls them
_ADAPTERS = "adapters"  # what answers in the metrics of a run that names nothing else
_MOST_SETTINGS_BYTES, _MOST_CARD_BYTES = 16 << 20, 4 << 20
_MOST = {"max_length": 1 << 17, "eval_batch_size": 1 << 16}
"""The most tokens to which a stranger's run may pad each text, and the most texts that it may ask at a time."""


def push_run(
    folder: Path,
    repo_id: str,
    *,
    task: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    data_license: str | None = None,
    **options: Unpack[PushOptions],
) -> CommitInfo:
    """Push the finished tasks of a run; the base model is not needed for it.

    Args:
        folder: the folder of the run; with several seeds, the first seed is pushed.
        repo_id: `user/name`.
        task: push this task alone.
        base_model: the name on the hub by which others find the base model; None: that of the run, if it has one.
        license: of the adapters, for the model card.
        data_license: of the data, for the model card.
        **options: see `PushOptions`.

    Raises:
        FileNotFoundError: the folder holds no run, or no task of the run is finished.
        ValueError: there is no such task, a file is damaged, or a name cannot be that of a repository.
        HubError: the hub refuses, or cannot be reached.
    """
    check_repo_id(repo_id)
    if base_model is not None and on_the_hub(base_model) is None:
        raise ValueError(f"base_model is {base_model!r}; it must be the name of a model on the hub, for others to load")
    run = run_folder(folder)
    settings = read_json(run / RUN_FILE)
    if not (adapter_folder(run) / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{run}: no task of this run is finished, so there is nothing to push yet")
    saved = read_checkpoint(adapter_folder(run), lazy=True).of_task(task)
    about, files, documents = settings["about"], {}, {}
    asked = _asked(settings, saved)
    if {"base_model", "data"} <= about.keys():  # otherwise it was started from Python, and nobody can predict with it
        base_model = base_model or _base_model(about["base_model"])
        _check_bounds(run / RUN_FILE, TrainingOptions.from_dict(settings["training"]))  # nobody could pull it
        head = None if task is not None else _joint_head(run, settings, saved)
        classes = {entry.info.name: entry.info.label_names for entry in saved.adapters.entries()}
        settings = shared_settings(settings, classes, base_model, alone=task is not None)
        if head is not None:
            settings[SHARED_HEAD] = head[1]
            files[head[1]["file"]] = head[0] / head[1]["file"]
        documents[RUN_FILE] = settings
    metrics = read_json(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else None
    card = model_card(
        saved,
        repo_id,
        base_model=f"sentence-transformers/{MINILM}" if base_model == MINILM else base_model,
        results=[]
        if metrics is None
        else eval_results(
            metrics, saved.adapters, saved.config.task_type, answered_by=about.get("answered_by", _ADAPTERS)
        ),
        asked=asked,
        data_license=data_license,
        card_data={} if license is None else {"license": license},
    )
    return push_checkpoint(saved, repo_id, str(card), files=files, documents=documents, **options)


def shared_settings(
    settings: Mapping[str, Any], tasks: Mapping[str, Sequence[str]], base_model: str | None, *, alone: bool
) -> dict[str, Any]:
    """Return the settings of a run as others get them: of these tasks, and without paths.

    Args:
        settings: those of the run.
        tasks: the tasks that are shared, with the names of their classes; none: they are not known.
        base_model: the name of the base model for others.
        alone: whether they are not all of the run, so that a head over all classes is no use.
    """
    about = {name: settings["about"][name] for name in _ABOUT if name in settings["about"]}
    if alone:
        about.pop("answered_by", None)
    data = dict(settings["about"]["data"])
    data.pop("stream_data", None)
    if data.get("tasks"):
        specs = dict(zip(settings["tasks"], data["tasks"]))
        data["tasks"] = [_without_folder(name, spec) for name, spec in specs.items() if name in tasks]
        kinds = data.get("problem_types", [])
        data["problem_types"] = [each for each in kinds if "=" not in each or each.rpartition("=")[0] in tasks]
        left_out = [name for name in specs if name not in tasks]
        if "templates" in data:
            of_others = tuple(f"{each}=" for each in left_out)
            data["templates"] = [each for each in data["templates"] if not each.startswith(of_others)]
        if "label_words" in data:
            data["label_words"] = [each for each in data["label_words"] if _is_for(each, tasks, left_out)]
    about |= {"base_model": base_model, "data": data, SHARED: True}
    kept = {"about": about, "tasks": {name: x for name, x in settings["tasks"].items() if name in tasks}}
    for each in ("label_words", "templates"):
        if each in settings:
            kept[each] = {name: x for name, x in settings[each].items() if name in tasks}
    return {name: value for name, value in settings.items() if name != SHARED_HEAD} | kept


def _is_for(word: str, tasks: Mapping[str, Sequence[str]], left_out: Sequence[str]) -> bool:
    """Return whether `class=word` or `task/class=word` may be for one of the shared tasks: others refuse it."""
    if not all(tasks.values()):
        return not word.startswith(tuple(f"{each}/" for each in left_out))
    label = word.rpartition("=")[0]
    return any(label in (name, f"{task}/{name}") for task, names in tasks.items() for name in names)


def _asked(settings: Mapping[str, Any], saved: Checkpoint) -> dict[str, Asked] | None:
    """Return how a language model is asked about each task; None for models with heads."""
    if saved.config.task_type in HEAD_TASK_TYPES:
        return None
    templates, words = settings.get("templates", {}), settings.get("label_words", {})
    chat = settings["training"].get("chat", False)
    return {name: Asked(templates.get(name), tuple(words.get(name, ())), chat) for name in saved.adapters}


def _base_model(name: str | None) -> str | None:
    """Return the name of a run's base model for others; None if it is a folder."""
    return None if name is None or _is_absolute(name) else name


def _without_folder(name: str, spec: str) -> str:
    """Return the spec of a task with the name of a file in place of its path; a dataset of the hub stays."""
    path = spec.removeprefix(f"{name}=")
    if not _is_absolute(path):
        return spec
    file = (PureWindowsPath if chr(92) in path else PurePosixPath)(path).name
    return f"{name}={file}" if is_readable(file) else f"{name}=./{file}"  # a bare name would be a dataset of the hub


def _is_absolute(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()


def _joint_head(run: Path, settings: Mapping[str, Any], saved: Checkpoint) -> tuple[Path, dict[str, str]] | None:
    """Return where the head over all classes of a run is; None: it has none."""
    shared = settings.get(SHARED_HEAD)
    found = joint_head_file(run, len(saved.adapters)) if shared is None else (run, shared)
    if found is not None:
        _check_head(found[0], found[1], saved)  # a damaged one is not for others
    return found


def _check_head(folder: Path, entry: Mapping[str, str], saved: Checkpoint) -> None:
    """Raise a CorruptFileError if that is not the file of a head over all classes of a checkpoint."""
    own = [saved.adapters[name].head_weight for name in list(saved.adapters)[:1]]
    classes = sum(len(each.info.label_names) for each in saved.adapters.entries())
    read_joint_head(folder, entry, classes=classes, features=next((x.shape[1] for x in own if x is not None), None))


def eval_results(
    metrics: Mapping[str, Any], tasks: Collection[str], task_type: str, *, answered_by: str = _ADAPTERS
) -> list[EvalResult]:
    """Return what a run measured, in the words of the hub: each task under its own adapter, and all without a name.

    Args:
        metrics: the content of `metrics.json`.
        tasks: the tasks that count.
        task_type: of the run.
        answered_by: what answers if no task is named, by its name in the metrics.
    """
    last = metrics["task_adapter"]["accuracy_matrix"][-1]
    kind = PIPELINES[task_type]
    found = [
        EvalResult(
            task_type=kind,
            dataset_type=record["name"],
            dataset_name=record["name"],
            dataset_split="test",
            metric_type=_METRIC_IDS[record.get("metric", "accuracy")],
            metric_name=WORDS[record.get("metric", "accuracy")],
            metric_value=round(value, 4),
        )
        for record, value in zip(metrics["per_task"], last)
        if record["name"] in tasks
    ]
    unnamed = unnamed_results(metrics).get(answered_by, {}).get("average_accuracy")
    if unnamed is not None and len(found) == len(last) > 1:
        found.append(
            EvalResult(
                task_type=kind,
                dataset_type="all-tasks",
                dataset_name="all tasks, not named",
                dataset_split="test",
                metric_type="accuracy",
                metric_name="accuracy of task and answer",
                metric_value=round(unnamed, 4),
            )
        )
    return found


@dataclass(frozen=True)
class PulledRun:
    """What was pulled.

    Attributes:
        tasks: the names of its tasks.
        is_run: whether `predict` and `eval` can open it; otherwise it was pushed from Python.
        base_model: the base model that they will load; None: its author had it in a folder.
    """

    tasks: list[str]
    is_run: bool
    base_model: str | None


def pull_run(
    repo_id: str, out: Path, *, base_model: str | None = None, **options: Unpack[DownloadOptions]
) -> PulledRun:
    """Pull what was pushed into a new folder. Every file is checked first; the folder is complete, or it is not there.

    Args:
        repo_id: `user/name`.
        out: the folder, which must not exist, or be empty.
        base_model: a folder or a name on the hub of the base model, in place of that of the run.
        **options: see `DownloadOptions`.

    Raises:
        ValueError: `out` is not empty, a file is damaged, or the name cannot be that of a repository.
        HubError: the hub does not answer, or does not show the repository.
    """
    check_repo_id(repo_id)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out is {str(out)!r}, which is there and is not an empty folder; choose another")
    source = on_hub(repo_id, **options)
    assert source.elsewhere is not None
    saved = read_checkpoint(source.folder, elsewhere=source.elsewhere)
    there = source.elsewhere.fetch_if_there({RUN_FILE: _MOST_SETTINGS_BYTES, CARD_FILE: _MOST_CARD_BYTES})
    settings = _pulled_settings(source.folder / RUN_FILE) if RUN_FILE in there else None
    head = None if settings is None else settings.get(SHARED_HEAD)
    if head is not None:
        source.elsewhere.fetch({checked_name(source.folder, head): MOST_HEAD_BYTES})
        _check_head(source.folder, head, saved)
    if settings is not None and base_model is not None:
        here = Path(base_model)
        settings["about"]["base_model"] = str(here.absolute()) if here.exists() else base_model
    out.parent.mkdir(parents=True, exist_ok=True)
    with hub_errors(repo_id), TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        whole = Path(work, "run")
        write_checkpoint(whole, saved.of_task(None))
        (whole / ".lock").unlink(missing_ok=True)
        if CARD_FILE in there:
            shutil.copyfile(source.folder / CARD_FILE, whole / CARD_FILE)
        if head is not None:
            shutil.copyfile(source.folder / head["file"], whole / head["file"])
        if settings is not None:
            write_json(whole / RUN_FILE, settings)
        if out.exists():
            out.rmdir()
        os.replace(whole, out)
    base = None if settings is None else settings["about"]["base_model"]
    return PulledRun(list(saved.adapters), settings is not None, base)


def _pulled_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a run that anybody may have written."""
    check_link(path)
    settings = read_json(path, most_bytes=_MOST_SETTINGS_BYTES)
    about: Any = settings.get("about")
    kinds = {"method": dict, "training": dict, "tasks": dict, "about": dict}
    right = all(isinstance(settings.get(name), kind) for name, kind in kinds.items())
    right = right and isinstance(about.get("data"), dict) and isinstance(about.get("base_model"), str | None)
    words, templates = (settings.get(name, {}) for name in ("label_words", "templates"))
    right = right and all(isinstance(each, dict) for each in (words, templates, settings.get(SHARED_HEAD, {})))
    right = right and all(isinstance(each, str) for each in templates.values())
    right = right and all(isinstance(each, list) for each in words.values())
    if not right or not all(isinstance(word, str) for each in words.values() for word in each):
        raise CorruptFileError(f"{path} does not hold the settings of a run")
    try:
        DataOptions.from_dict(about["data"])
        training = TrainingOptions.from_dict(settings["training"])
    except (TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} holds settings that no run of this version has: {error}") from None
    _check_bounds(path, training)
    return settings


def _check_bounds(path: Path, training: TrainingOptions) -> None:
    for name, most in _MOST.items():
        if getattr(training, name) > most:
            raise CorruptFileError(f"{path} has {name} {getattr(training, name)}; {most} is the most for a shared run")
