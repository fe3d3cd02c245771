"""Runs in one of several processes, each with its own working folder.

Started by test_processes.py, as a launcher does: `python processes_run.py SETTINGS`, a pickle of settings by name. The
run of each name is in a folder of that name in the working folder; `metrics.pickle` there holds what each returned.
"""

from __future__ import annotations

import pickle
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from qtuning_fast.lifelong.listener import RunListener
from qtuning_fast.lifelong.processes import joined
from qtuning_fast.lifelong.runs import run_stream
from qtuning_fast.model.distributed import process_number


def listening(tasks: Any, title: str) -> Any:
    assert process_number() == 0, "only the first process shows progress"
    return nullcontext(RunListener())


def main(settings: Path) -> None:
    torch.set_num_threads(1)
    with joined():
        for name, each in pickle.loads(settings.read_bytes()).items():
            run_stream(each, Path(name), listening)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
