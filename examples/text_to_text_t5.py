"""Train a stream of tasks on T5 with Q-tuning as published: a bounded queue of prompts in front of the input.

Shows: placement="input", words for classes, LifelongTrainer with resume, and scores of those words alone.
Needs: pip install 'qtuning_fast[lifelong]', and the model by name from the Hugging Face hub or as a folder.
Takes: three times 300 steps; how long depends on the model. The same command resumes an interrupted run.

    python examples/text_to_text_t5.py --task mood=reviews.csv --task spam=sms.csv
    python examples/text_to_text_t5.py --words "mood=bad,good"   # the packaged tasks of docs/data.md, one in your words
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from qtuning_fast import LifelongTrainer, QTuningConfig, QTuningModel, answer_scores
from qtuning_fast.lifelong import Task, TrainingOptions, load_base_model, load_stream, load_task
from qtuning_fast.lifelong.progress import ProgressBars
from qtuning_fast.lifelong.report.console import summary_table


def load_tasks(specs: list[str], shots: int) -> list[Task]:
    """One's own files, or three packaged tasks: questions, film reviews, science topics."""
    sizes = {"shots": shots, "validation_shots": max(4, shots // 4), "test_size": 100}
    return [load_task(spec, **sizes) for spec in specs] or load_stream("offline-5", **sizes)[:3]


def with_words(tasks: list[Task], specs: list[str]) -> list[Task]:
    """The tasks with label words of one's own; by default the names of the classes are the words."""
    words = {name: given.split(",") for name, _, given in (spec.partition("=") for spec in specs)}
    if unknown := words.keys() - {task.name for task in tasks}:
        raise ValueError(f"--words names no task: {', '.join(unknown)}; there are {', '.join(t.name for t in tasks)}")
    return [replace(task, label_words=words.get(task.name)) for task in tasks]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/flan-t5-small", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=PATH", help="CSV, JSONL, Parquet; repeat")
    parser.add_argument("--words", action="append", default=[], metavar="NAME=WORD,WORD", help="for sorted classes")
    parser.add_argument("--shots", type=int, default=16, help="training examples a class")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps for each task")
    parser.add_argument("--max-length", type=int, default=64, help="tokens that a text is cut to")
    parser.add_argument("--out", default="runs/text_to_text_t5", help="folder of the run")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, markup=False)

    tasks = with_words(load_tasks(options.task, options.shots), options.words)
    base, tokenizer = load_base_model(options.model, "text-to-text")
    config = QTuningConfig(
        task_type="text-to-text",
        placement="input",  # a row is an embedding in front of the input
        gate=None,  # NoRGa's, which Q-tuning does not know; "tanh" combines the two
        prompt_length=10,
        queue_size=2,  # so that the third task finds the queue full
        shared_length=10,
        reparameterization="mlp",  # while a prompt trains, a network computes it
    )
    training = TrainingOptions(
        steps=options.steps,
        eval_every=max(1, options.steps // 5),
        max_length=options.max_length,
        prompt_rate=0.3,  # of Progressive Prompts for T5
    )
    with ProgressBars(len(tasks), "text to text", console) as bars:
        run = LifelongTrainer(base, tokenizer, config, tasks, training, options.out, listener=bars)
        metrics = run.run()
    console.print(summary_table(metrics))

    # What LifelongTrainer asks of each text, by hand: how probable is each of the words, and only they?
    model = QTuningModel.from_pretrained(base, Path(options.out) / "adapter").eval()
    task = tasks[-1]
    model.set_task(task.name)
    batch = tokenizer(task.test.inputs[:1], truncation=True, max_length=options.max_length, return_tensors="pt").to(
        model.device
    )
    answers = [tokenizer(text_target=word)["input_ids"] for word in task.answers]
    chances = answer_scores(model, dict(batch), answers)[0].softmax(-1).tolist()
    console.print(f"{task.name}: {task.test.inputs[0][:70]!r}")
    for chance, word in sorted(zip(chances, task.answers), reverse=True):
        console.print(f"  {chance:6.1%} {word}")
    return metrics | {"chances": dict(zip(task.answers, chances))}


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
