"""Serve many tasks with one frozen model: adapters on disk, bounded memory, and a task for each row of a batch.

Shows: from_pretrained(..., lazy=True), task_names, "infer" for rows whose task nobody names, set_memory_limits,
remove_task and load_task between requests.
Needs: pip install 'qtuning_fast[lifelong]'. Without --adapters it uses untrained ones, which take as long.
Takes: 13 s on one of two CPU cores.

    python examples/serve_mixed_tasks.py --tasks 64
    python examples/serve_mixed_tasks.py --adapters runs/classify_bert
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong.base_models import MINILM, load_base_model

TEXT = "it was a very old house, and the new family had never seen the garden behind it"


def examples(text: dict[str, Tensor], words: int, number: int, rows: int, classes: int = 1) -> dict[str, Tensor]:
    """Texts of a task: some of their tokens are the task's, one is the class's own.

    Args:
        text: one text, tokenised.
        words: size of the vocabulary.
    """
    chance = torch.Generator().manual_seed(1000 * number + rows)
    labels = torch.arange(rows) % classes
    ids = text["input_ids"][:1].repeat(rows, 1)
    tokens, device = ids.shape[1], ids.device
    own = words // 2 + 37 * number % (words // 2 - 6)  # any tokens will do
    for row in range(rows):
        places = 1 + torch.randperm(tokens - 2, generator=chance)[:6]
        ids[row, places.to(device)] = own
        ids[row, int(places[0])] = own + 1 + int(labels[row])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def write_adapters(base: Any, folder: str, tasks: int, text: dict[str, Tensor]) -> None:
    """Save a model with so many tasks, none of them trained, which knows their texts."""
    model, words = QTuningModel(base, QTuningConfig(queue_size=3)), base.config.vocab_size
    for number in range(tasks):
        name, classes = f"task-{number:02d}", 2 + number % 4
        model.start_task(name, num_labels=classes)
        model.finish_task()
        train, validation = (examples(text, words, number, rows, classes) for rows in (4 * classes, 2 * classes))
        model.record_statistics(name, [train], validation=[validation])
    model.save_pretrained(folder)
    model.detach()


def milliseconds(call: Callable[[], Any], times: int = 1) -> float:
    """The median of so many calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)


@torch.no_grad()
def serve(model: QTuningModel, folder: str, batch: dict[str, Tensor], times: int) -> dict[str, Any]:
    """Batches of many tasks, of few under bounds on memory, and with tasks that go and come."""
    rows, chance = len(batch["input_ids"]), random.Random(0)
    names = [model.tasks[row % len(model.tasks)] for row in range(rows)]
    several = f"{len(set(names))} tasks"
    latency, refused = {}, []

    def mixed() -> Tensor:
        return model(**batch, task_names=names).logits  # [rows, most classes], −inf beyond a task's own

    def row_by_row() -> list[Tensor]:
        found = []
        for row, name in enumerate(names):
            model.set_task(name)
            found.append(model(**{key: x[row : row + 1] for key, x in batch.items()}).logits[0])
        model.set_task(None)
        return found

    def any_two() -> None:
        two = chance.sample(model.tasks, min(2, len(model.tasks)))
        model(**batch, task_names=[two[row % len(two)] for row in range(rows)])

    model(**batch)  # warms up
    latency[f"{several}, read from disk"] = milliseconds(mixed)
    latency[f"{several}, in their slots on the device"] = milliseconds(mixed, times)
    latency[f"{several}, row by row"] = milliseconds(row_by_row, times)
    latency["no task, the base model alone"] = milliseconds(lambda: model(**batch), times)
    found = None
    if len(model.statistics):  # nobody names the tasks of these rows
        places = [row % len(model.tasks) for row in range(rows)]
        words = model.base_model.config.vocab_size
        parts = [examples(batch, words, place, 1) for place in places]
        unnamed = {
            key: torch.cat([part[key] for part in parts]).to(model.device) for key in ("input_ids", "attention_mask")
        }
        latency[f"{several}, inferred"] = milliseconds(lambda: model(**unnamed, task_names="infer"), times)
        found = model(**unnamed, task_names="infer").task_index.tolist()
        found = sum(a == b for a, b in zip(found, places)) / rows
    logits = mixed()
    error = max(float((one[: len(own)] - own).abs().max()) for one, own in zip(logits, row_by_row()))

    # Room for two adapters on the device and two in the host's memory, however many there are.
    room = 2 * model.slots.bytes // model.slots.slots
    model.set_memory_limits(device_bytes=room, host_bytes=room)
    latency["any 2 tasks, memory bounded to 2"] = milliseconds(any_two, times)
    bounded = {"room": room, "device": model.slots.bytes, "host": model.adapters.bytes_in_memory}
    try:
        mixed()
    except ValueError as reason:  # more tasks than have room
        refused.append(str(reason))
    model.set_memory_limits()

    # A task goes and comes between two batches, and no other notices.
    gone = names[0]
    latency["taking a task out"] = milliseconds(lambda: model.remove_task(gone))
    try:
        mixed()
    except ValueError as reason:
        refused.append(str(reason))
    latency["taking it in again, from disk"] = milliseconds(lambda: model.load_task(folder, gone))
    as_before = torch.equal(mixed(), logits)
    return {
        "latency": latency,
        "error": error,
        "found": found,
        "bounded": bounded,
        "refused": refused,
        "as_before": as_before,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MINILM, help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--adapters", help="a folder that save_pretrained wrote for this model")
    parser.add_argument("--tasks", type=int, default=32, help="how many, where there is no such folder")
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--steps", type=int, default=10, help="batches that a latency is the median of")
    parser.add_argument("--out", default="runs/serve_mixed_tasks", help="folder for the adapters that stand in")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)
    console = Console(highlight=False, markup=False)

    base, tokenizer = load_base_model(options.model)
    folder = options.adapters or options.out
    text = dict(tokenizer([TEXT], return_tensors="pt").to(base.device))
    if options.adapters is None:
        write_adapters(base, folder, options.tasks, text)
    model = QTuningModel.from_pretrained(base, folder, lazy=True).eval()
    if not model.tasks:
        raise ValueError(f"{folder} holds no tasks to serve")
    in_memory = model.adapters.bytes_in_memory
    console.print(f"{len(model.tasks)} tasks in {folder}, {in_memory} bytes of them in memory")

    batch = {key: x.repeat(options.rows, 1) for key, x in text.items()}
    report = serve(model, folder, batch, options.steps)
    for reason in report["refused"]:
        console.print(f"refused: {reason}", overflow="ellipsis", no_wrap=True)
    title = f"{options.rows} rows of {batch['input_ids'].shape[1]} tokens"
    table = Table("a batch of", Column("ms", justify="right"), title=title)
    for what, taken in report["latency"].items():
        table.add_row(what, f"{taken:.1f}")
    console.print(table)
    if report["found"] is None:
        console.print(f"{folder} holds no statistics, so that tasks have to be named; see record_statistics")
    else:
        console.print(f"the task was found for {report['found']:.0%} of the rows that do not name it")
    console.print(f"a mixed batch differs from row by row by {report['error']:.0e} at most")
    return report | {"tasks": model.tasks, "in_memory": in_memory}


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
