"""Saved here, loaded in a new process: the same logits, bit for bit, in every family and placement."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from qtuning_fast import QTuningConfig, QTuningModel

LOAD = """
import sys
from pathlib import Path
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from qtuning_fast import QTuningModel

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    inputs = torch.load(folder / "inputs.pt")
    writers = {"encoder-decoder": AutoModelForSeq2SeqLM, "decoder": AutoModelForCausalLM}
    load = writers.get(inputs.pop("kind"), AutoModel)
    base = load.from_pretrained(folder / "base").eval()
    model = QTuningModel.from_pretrained(base, folder / "adapters")
    answers = {}
    for task in model.tasks:
        for live in (False, True):
            model.set_task(task, live=live)
            with torch.no_grad():
                answers[task, live] = model(**inputs).logits
    torch.save(answers, folder / "answers.pt")
"""


def test_a_new_process_gives_the_same_logits(families: Any, tmp_path: Path) -> None:
    expected = {}
    for name, family in families.items():
        for placement in ("prefix", "input"):
            folder = tmp_path / f"{name} {placement}"
            base = family.base_model()
            base.save_pretrained(folder / "base")
            config = QTuningConfig(
                prompt_length=2, queue_size=2, shared_length=1, task_type=family.task_type, placement=placement
            )
            model, inputs = QTuningModel(base, config), family.batch()
            for task in ("first", "second", "third"):
                model.start_task(task, 3)
                with torch.no_grad():
                    for parameter in model.training_prefix.parameters():
                        parameter.add_(torch.randn_like(parameter))
                model.finish_task()
            model.save_pretrained(folder / "adapters")
            torch.save(inputs | {"kind": family.kind}, folder / "inputs.pt")
            for task in model.tasks:
                for live in (False, True):
                    model.set_task(task, live=live)
                    with torch.no_grad():
                        expected[folder, task, live] = model(**inputs).logits
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run([sys.executable, "-c", LOAD, tmp_path], check=True, env=os.environ | {"PYTHONPATH": path})
    for (folder, task, live), logits in expected.items():
        answers = torch.load(folder / "answers.pt")
        assert torch.equal(answers[task, live], logits), (folder.name, task, live)
    assert len(expected) == len(families) * 2 * 3 * 2
