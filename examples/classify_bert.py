"""Train two tasks on a frozen BERT, one after the other, with transformers' own Trainer.

Shows: attaching, training, evaluating each task under its own adapter, saving, loading, predicting.
Needs: pip install 'qtuning_fast[lifelong]'. It uses the packages of docs/data.md if they are installed, else toy texts.
Takes: 78 s on one of two CPU cores, for accuracies of 0.890 (questions) and 0.760 (film reviews).

    python examples/classify_bert.py
    python examples/classify_bert.py --model bert-base-uncased --steps 200
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Column, Table
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from qtuning_fast import QTuningConfig, QTuningModel
from qtuning_fast.lifelong import Task, few_shot_split
from qtuning_fast.lifelong.base_models import MINILM, load_base_model
from qtuning_fast.lifelong.text_streams import TEXT_STREAMS

TOY = {
    "mood": {"good": ["a joy to", "warm and fun to"], "bad": ["a bore to", "dull and long to"]},
    "topic": {"sport": ["the team will", "the coach will"], "space": ["the rocket will", "the moon will"]},
}
ENDS = ["watch", "read", "hear", "see", "follow", "keep", "finish", "open", "close", "remember", "play", "share"]


def load_tasks(toy: bool) -> list[Task]:
    """Questions by the kind of their answer, then film reviews by their mood; or toy texts."""
    if not toy:
        sizes = {"shots": 100, "validation_shots": 0, "test_size": 200, "seed": 0}
        return [source.load(**sizes) for source in TEXT_STREAMS["offline-5"].sources[:2]]
    tasks = []
    for name, classes in TOY.items():
        rows = [(f"{start} {end}", label) for label in classes for start in classes[label] for end in ENDS]
        texts, labels = zip(*rows)
        tasks.append(few_shot_split(texts, labels, name=name, shots=14, validation_shots=0, test_size=20, seed=0))
    return tasks


def learn(model: QTuningModel, tokenizer: Any, task: Task, steps: int, folder: str) -> list[float]:
    """Train one task; returns the losses on the way."""
    rows = zip(task.train.inputs, task.train.labels)
    train = [{**tokenizer(text, truncation=True, max_length=48), "labels": label} for text, label in rows]
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
    )
    model.start_task(task.name, label_names=task.label_names)  # a new prompt, gate and head train, nothing else
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.finish_task()  # from here on a small adapter that never changes
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def predict(model: QTuningModel, tokenizer: Any, texts: Sequence[str], task: str) -> list[int]:
    """The class of each text, under the adapter of a task."""
    model.eval()
    model.set_task(task)
    found: list[int] = []
    for start in range(0, len(texts), 64):
        some = list(texts[start : start + 64])
        batch = tokenizer(some, padding=True, truncation=True, max_length=48, return_tensors="pt").to(model.device)
        found += model(**batch).logits.argmax(-1).tolist()
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MINILM, help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps for each task")
    parser.add_argument("--toy", action="store_true", help="toy texts even where real ones are installed")
    parser.add_argument("--out", default="runs/classify_bert", help="folder for the adapters")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)
    console = Console(highlight=False, markup=False)

    try:
        tasks = load_tasks(options.toy)
    except ImportError as error:
        console.print(f"toy texts, because {error}")
        tasks = load_tasks(toy=True)
    base, tokenizer = load_base_model(options.model)
    model = QTuningModel(base, QTuningConfig(prompt_length=10, queue_size=3))

    losses = {}
    for task in tasks:
        losses[task.name] = learn(model, tokenizer, task, options.steps, options.out)
        console.print(f"{task.name}: loss {losses[task.name][0]:.2f}, in the end {losses[task.name][-1]:.2f}")
    model.save_pretrained(options.out)

    model = QTuningModel.from_pretrained(model.detach(), options.out)  # as another process would
    table = Table("task", "classes", "accuracy", Column("a text", no_wrap=True, max_width=30), "is")
    accuracy = {}
    for task in tasks:
        found = predict(model, tokenizer, task.test.inputs, task.name)
        accuracy[task.name] = sum(a == b for a, b in zip(found, task.test.labels)) / len(found)
        classes = model.label_names(task.name)
        text = " ".join(task.test.inputs[0].split())
        table.add_row(task.name, f"{len(classes)}", f"{accuracy[task.name]:.3f}", text, classes[found[0]])
    console.print(table)
    return {"accuracy": accuracy, "losses": losses, "tasks": model.tasks}


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
