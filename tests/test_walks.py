"""Which files an argument passes: `query` down to the kernel that multiplies it, `input_ids` to the base model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel

ROOT = Path(__file__).parent.parent

QUERY = """
import json, sys, traceback
from pathlib import Path
import torch
from qtuning_fast import prefix_attention
from qtuning_fast.attention import api
from qtuning_fast.kernels import arguments, launch

walks = []
def note(*args, **kwargs):
    walks.append([frame.filename for frame in traceback.extract_stack()])

checked, rows, run = api.checked, arguments.rows, launch.Launch.run
api.checked = lambda *args: (note(), checked(*args))[1]
arguments.rows = lambda *args: (note(), rows(*args))[1]
launch.Launch.run = lambda self: (note(), run(self))[1]
q, p = torch.randn(1, 2, 3, 16), torch.randn(2, 5, 16)
prefix_attention(q, q, q, p, p, backend="fused")
launched = walks[-1]
visited = [checked.__code__.co_filename, rows.__code__.co_filename]
print(json.dumps({"launched": launched, "visited": visited}))
"""


def in_order(paths: list[str]) -> list[str]:
    """This project's files among them, each once."""
    inside = [Path(path).resolve() for path in paths if Path(path).is_absolute()]
    names = [str(path.relative_to(ROOT)) for path in inside if path.is_relative_to(ROOT)]
    return [name for name in dict.fromkeys(names) if not name.startswith((".venv", "tests"))]


def test_query_passes_six_files_on_its_way_to_the_product() -> None:
    """Four on the way down to the launch; in two it is looked at: checked, and turned into a pointer and strides."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", QUERY], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    way = in_order(found["launched"])
    assert way == [
        "qtuning_fast/attention/api.py",
        "qtuning_fast/attention/custom_op.py",
        "kernels/forward.py",
        "kernels/launch.py",
    ]
    assert "tl.dot" in (ROOT / "kernels/forward.py").read_text()
    assert in_order(found["visited"]) == ["qtuning_fast/attention/arguments.py", "kernels/arguments.py"]


def test_input_ids_pass_five_files_on_their_way_to_the_base_model() -> None:
    """The base model's order of inputs; the model; whose turn it is; the heads and the loss; the base model's call."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = QTuningModel(BertModel(BertConfig(**sizes, vocab_size=9)), QTuningConfig(prompt_length=2, shared_length=2))
    walks = []

    def note(module: nn.Module, args: object, kwargs: object) -> None:
        walks.append(in_order([frame.filename for frame in traceback.extract_stack()]))

    handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.tensor([[1, 2, 3]])
    model.start_task("reviews", 2)
    walks.clear()  # of trying whether gradients pass
    model(input_ids=ids, labels=torch.tensor([1]))
    model.finish_task()
    model(input_ids=ids)
    model(input_ids=ids, task_names=["reviews"])
    model.set_task(None)
    model(input_ids=ids)
    handle.remove()
    names = ("pretrained", "model", "active_task", "computing", "backbone")
    under_a_task = [f"qtuning_fast/model/{name}.py" for name in names]
    of_several = [name for name in under_a_task if "active_task" not in name]
    of_none = [name for name in under_a_task if "computing" not in name]
    assert walks == [under_a_task, under_a_task, of_several, of_none]
