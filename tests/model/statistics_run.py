"""Records statistics of one task in two processes, each with its share of the examples; each writes what it came to.

Started by test_known_tasks.py: `statistics_run.py FOLDER RANK`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import BertConfig, BertModel

from qtuning_fast import QTuningConfig, QTuningModel

Batch = dict[str, Tensor]


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = QTuningModel(BertModel(BertConfig(vocab_size=40, **sizes)), QTuningConfig(prompt_length=2, shared_length=1))
    model.start_task("task", 3)
    model.finish_task()
    draw = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(5, 40, (4, 10), generator=draw), "labels": torch.tensor([0, 1, number // 4, 0])}
        for number in range(9)
    ]
    # The last class is in the second share alone, which is smaller; validation is in one share alone.
    shares = [batches[:6], batches[6:8]]
    model.record_statistics("task", shares[rank], validation=batches[8:] if rank else [])
    together = written(model)
    wrong = batches[0] | {"labels": torch.full((4,), 7)}
    error = None
    try:
        model.record_statistics("task", [wrong] if rank else batches[:1])
    except ValueError as found:
        error = str(found)
    unchanged = written(model) == together
    dist.destroy_process_group()
    model.record_statistics("task", batches[:8], validation=batches[8:])
    result = {"together": together, "alone": written(model), "error": error if unchanged else "changed"}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))


def written(model: QTuningModel) -> dict[str, object]:
    """The statistics as numbers; the scatter, because rows of its factor may have either sign."""
    found = model.statistics["task"]
    tensors = {name: x.tolist() for name, x in found.tensors().items() if not name.endswith("factor")}
    return tensors | {"scatter": found.features.scatter.tolist()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
