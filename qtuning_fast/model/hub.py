"""Push a checkpoint into a repository of the Hugging Face hub, in one commit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from qtuning_fast.model.checked_files import write_json
from qtuning_fast.model.checkpoint import Checkpoint, write_checkpoint
from qtuning_fast.model.hub_files import LIBRARY, check_repo_id, hub_errors
from qtuning_fast.model.model_card import CARD_FILE, is_written_by_us

_PUSHED = re.compile(r"([a-z_]+-\d+|state|head)-[0-9a-f]{12}\.safetensors|adapter_config\.json|run\.json")


class PushOptions(TypedDict, total=False):
    """How to push to the hub, in the words of transformers.

    Attributes:
        private: whether a new repository is private; None: as is usual for the user or the organisation.
        token: of the hub, as text; None: the one that is stored on this machine.
        revision: the branch, which is made if there is none; None: the default branch.
        commit_message, commit_description: of the commit.
        create_pr: open a pull request instead.
    """

    private: bool | None
    token: str | bool | None
    revision: str | None
    commit_message: str | None
    commit_description: str | None
    create_pr: bool


def push_checkpoint(
    saved: Checkpoint,
    repo_id: str,
    card: str,
    *,
    files: Mapping[str, Path] | None = None,
    documents: Mapping[str, dict[str, Any]] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Push a checkpoint, in place of one that was pushed before; the repository is made if there is none.

    All files come in one commit, so a push that is interrupted leaves what was there. A `README.md` that someone else
    wrote stays; so does every file that no checkpoint has.

    Args:
        saved: the checkpoint; one of `Checkpoint.of_task`, because writing it says where its files are.
        repo_id: `user/name`, or a name of the user's own.
        card: the content of `README.md`.
        files: further files, by name.
        documents: further contents, by the name of their JSON file.
        private, token, revision, commit_message, commit_description, create_pr: see `PushOptions`.

    Raises:
        ValueError: the name cannot be that of a repository.
        HubError: the hub refuses, or cannot be reached; nothing has changed there but that the repository may be new.
    """
    check_repo_id(repo_id)
    with TemporaryDirectory() as work, hub_errors(repo_id, revision=revision, pushes=True):
        folder = Path(work, "checkpoint")
        write_checkpoint(folder, saved)
        for name, content in (documents or {}).items():
            write_json(folder / name, content)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        to_push = {path.name: path for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
        to_push |= files or {}

        api = HfApi(token=token, **LIBRARY)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        before = api.list_repo_files(name, revision=revision)
        if CARD_FILE in before:
            page = api.hf_hub_download(name, CARD_FILE, revision=revision, local_dir=Path(work, "before"))
            if not is_written_by_us(Path(page).read_text(encoding="utf-8", errors="replace")):
                del to_push[CARD_FILE]
        gone = [each for each in before if _PUSHED.fullmatch(each) and each not in to_push]
        tasks = ", ".join(saved.adapters)
        return api.create_commit(
            name,
            [
                *(CommitOperationDelete(each) for each in gone),
                *(CommitOperationAdd(each, path) for each, path in to_push.items()),
            ],
            commit_message=commit_message or f"Upload Q-tuning adapters of {tasks or 'no task yet'}"[:72],
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
