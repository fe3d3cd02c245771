"""Train any model on any labelled texts of the Hugging Face hub, by name, with LifelongTrainer.

Shows: AutoModel, datasets.load_dataset, and how to make a Task of its result. (`load_task("dair-ai/emotion")` does it
in one line; this way you can also filter, join columns, or rename labels.)
Needs: pip install 'qtuning_fast[lifelong]' and a network, or folders: a saved model, and train.csv with text and label.
Takes: two times 100 steps of 16 texts, after the downloads; how long depends on the model.

    python examples/hub_model_and_dataset.py
    python examples/hub_model_and_dataset.py --model FacebookAI/roberta-base --dataset stanfordnlp/imdb --shots 32
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from qtuning_fast import LifelongTrainer, QTuningConfig
from qtuning_fast.lifelong import TrainingOptions
from qtuning_fast.lifelong.progress import ProgressBars
from qtuning_fast.lifelong.report.console import summary_table
from qtuning_fast.lifelong.tasks import Labelled, Task, few_shot_split


def task_of(name: str, text: str, label: str, shots: int) -> Task:
    """A few-shot task from a dataset; `name:config` where it has several."""
    path, _, config = name.partition(":")
    data = datasets.load_dataset(path, config or None)
    if missing := {text, label} - set(data["train"].column_names):
        raise ValueError(f"{name} has no column {', '.join(missing)}, only {', '.join(data['train'].column_names)}")

    def labelled(split: str) -> Labelled | None:
        if split not in data:
            return None
        kind, values = data[split].features[label], data[split][label]
        names = kind.int2str(list(values)) if isinstance(kind, datasets.ClassLabel) else map(str, values)
        return list(data[split][text]), list(names)

    train = labelled("train")
    assert train is not None
    return few_shot_split(
        *train,
        name=Path(path).name,
        shots=shots,
        validation_shots=max(1, shots // 2),
        test_size=200,
        seed=0,
        validation=labelled("validation"),
        test=labelled("test"),
        source=name,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-bert/bert-base-uncased", help="a name on the hub, or a folder")
    parser.add_argument("--dataset", action="append", metavar="NAME[:CONFIG]", help="on the hub, or a folder; repeat")
    parser.add_argument("--text", default="text", help="the column of texts")
    parser.add_argument("--label", default="label", help="the column of classes")
    parser.add_argument("--shots", type=int, default=16, help="training examples a class")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps for each task")
    parser.add_argument("--out", default="runs/hub_model_and_dataset", help="folder of the run")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console(highlight=False, markup=False)

    names = options.dataset or ["dair-ai/emotion", "fancyzhx/ag_news"]
    tasks = [task_of(name, options.text, options.label, options.shots) for name in names]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModel.from_pretrained(options.model).to("cuda" if torch.cuda.is_available() else "cpu")

    config = QTuningConfig(prompt_length=10, queue_size=3)
    training = TrainingOptions(steps=options.steps, eval_every=max(1, options.steps // 5))
    with ProgressBars(len(tasks), "hub", console) as bars:
        metrics = LifelongTrainer(base, tokenizer, config, tasks, training, options.out, listener=bars).run()
    console.print(summary_table(metrics))
    console.print(f"what was learned is in {options.out}/adapter, for QTuningModel.from_pretrained", soft_wrap=True)
    return metrics


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
