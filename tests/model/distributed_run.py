"""Four tasks with transformers.Trainer, in as many processes as it is started in; each writes what it came to.

Started by test_distributed.py: `torchrun distributed_run.py FOLDER BATCH SHARDED RETENTION`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from qtuning_fast import QTuningConfig, QTuningModel


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (32, 10), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones(10), "labels": row[0] % 3} for row in ids]


def digest(tensors: Any) -> str:
    parts = (tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main(folder: Path, batch: int, sharded: bool, retention: float) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    arguments = TrainingArguments(
        str(folder / "trainer"),
        max_steps=3,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
    )
    _ = arguments.device  # starts the process group
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    base = BertModel(BertConfig(vocab_size=40, **sizes))
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in base.encoder.layer:
            fully_shard(layer)
        fully_shard(base)
    config = QTuningConfig(
        prompt_length=2, queue_size=2, shared_length=2, eviction="random", retention_weight=retention
    )
    model = QTuningModel(base, config)
    losses = []
    for task in range(4):
        torch.manual_seed(10 * task + rank)  # processes draw different numbers, and must come to the same all the same
        model.start_task(f"task-{task}", 3)
        trainer = Trainer(model=model, args=arguments, train_dataset=examples())
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        model.finish_task()
    model.save_pretrained(folder / "saved")
    tensors = [tensor for adapter in model.adapters.values() for tensor in adapter.tensors().values()]
    result = {"losses": losses, "adapters": digest(tensors), "queue": digest(model.training_prefix.queue.rows)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sharded", float(sys.argv[4]))
