"""The commands that share a run over the Hugging Face hub: `qtuning-fast push | pull`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from qtuning_fast.cli_console import console, readable_errors, silence_libraries

RepoId = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the hub.")]


def push(
    repo_id: RepoId,
    folder: Annotated[Path, typer.Option("--run", help="Folder of a run.")],
    task: Annotated[str | None, typer.Option(help="Only this task, without the queue.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default as the hub has it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if there is none; default the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Name on the hub by which others find the base model; default that of the run.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the adapters, such as apache-2.0.")] = None,
    data_license: Annotated[str | None, typer.Option(help="Licence of the data, for the model card.")] = None,
) -> None:
    """Push the finished tasks of a run to the Hugging Face hub; log in first, by `hf auth login` or HF_TOKEN."""
    with readable_errors("The repository has what it had before.", alone="push"):
        silence_libraries()
        from qtuning_fast.lifelong.shared_run import push_run

        commit = push_run(
            folder,
            repo_id,
            task=task,
            base_model=base_model,
            license=license,
            data_license=data_license,
            private=private,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
        )
        console.print(f"Pushed: {commit.pr_url or commit.commit_url}", soft_wrap=True, markup=False, highlight=False)


def pull(
    repo_id: RepoId,
    out: Annotated[Path, typer.Option(help="New folder, for `predict --run` and `eval --run`.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default the main branch.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Base model, a folder or a hub name; default the one that the author names.")
    ] = None,
    force_download: Annotated[bool, typer.Option("--force-download", help="Also what is in the cache.")] = False,
) -> None:
    """Pull what was pushed into a new folder. Every file is checked; nothing in it is run."""
    with readable_errors("There is no folder yet: the same command starts again.", alone="pull"):
        silence_libraries()
        from qtuning_fast.lifelong.shared_run import pull_run

        found = pull_run(repo_id, out, revision=revision, base_model=base_model, force_download=force_download)
        console.print(f"Pulled {', '.join(found.tasks)} into {out}", soft_wrap=True, markup=False, highlight=False)
        run = shlex.quote(str(out))
        if not found.is_run:
            said = f"It was pushed from Python; open it there: QTuningModel.from_pretrained(base_model, {str(out)!r})"
        elif found.base_model is None:
            said = "Its base model was a folder of its author: pull it with --base-model and where you have that model."
        else:
            said = f'Try it: qtuning-fast predict --run {run} "a text"'
        console.print(said, soft_wrap=True, markup=False, highlight=False)
