"""Train tasks of images on a frozen vision transformer, with NoRGa's gated prompts in its first five layers.

Shows: layers, gate="tanh", gate_training="first-task" as in NoRGa's published runs, folders of images as tasks.
Needs: pip install 'qtuning_fast[lifelong]', and the model by name from the Hugging Face hub or as a folder.
Takes: two times 60 steps of 16 images; how long depends on the model.

    python examples/images_vit.py                              # two tasks of shapes that the script draws
    python examples/images_vit.py --task birds=birds --task cars=cars   # folders with a folder of images for each class
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from rich.console import Console

from qtuning_fast import LifelongTrainer, QTuningConfig, QTuningModel
from qtuning_fast.lifelong import TrainingOptions, load_base_model, load_task
from qtuning_fast.lifelong.data.images import open_image
from qtuning_fast.lifelong.progress import ProgressBars
from qtuning_fast.lifelong.report.console import summary_table

COLOURS = {"red": (220, 50, 40), "green": (50, 170, 60), "blue": (50, 80, 220)}
SHAPES = ["circle", "square", "triangle"]


def draw(colour: str, shape: str, chance: random.Random) -> Image.Image:
    """One shape somewhere on a noisy grey ground, 64 by 64."""
    noise = Image.frombytes("L", (64, 64), chance.randbytes(64 * 64))
    ground = Image.blend(Image.new("L", (64, 64), 128), noise, 0.3).convert("RGB")
    size = chance.randint(22, 36)
    x, y = chance.randint(2, 62 - size), chance.randint(2, 62 - size)
    corners = [(x, y), (x + size, y + size)]
    pen = ImageDraw.Draw(ground)
    if shape == "circle":
        pen.ellipse(corners, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(corners, fill=COLOURS[colour])
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLOURS[colour])
    return ground


def draw_tasks(folder: Path, images: int) -> list[str]:
    """Two tasks of so many images a class, as folders: which colour, and which shape whatever its colour."""
    chance = random.Random(0)
    for task, classes in (("colours", list(COLOURS)), ("shapes", SHAPES)):
        for label in classes:
            (folder / task / label).mkdir(parents=True, exist_ok=True)
            for number in range(images):
                colour = label if task == "colours" else chance.choice(list(COLOURS))
                shape = label if task == "shapes" else chance.choice(SHAPES)
                draw(colour, shape, chance).save(folder / task / label / f"{number}.png")
    return [f"colours={folder / 'colours'}", f"shapes={folder / 'shapes'}"]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="a folder, or a name on the hub")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FOLDER", help="images by class; repeat")
    parser.add_argument("--shots", type=int, default=16, help="training images a class")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps for each task")
    parser.add_argument("--out", default="runs/images_vit", help="folder of the run")
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, markup=False)

    specs = options.task or draw_tasks(Path(f"{options.out}-images"), 2 * options.shots + 8)
    tasks = [load_task(spec, shots=options.shots, validation_shots=8, test_size=60) for spec in specs]
    base, processor = load_base_model(options.model, "image-classification")
    config = QTuningConfig(
        task_type="image-classification",
        layers=range(min(5, base.config.num_hidden_layers)),
        gate="tanh",
        gate_training="first-task",  # and frozen from the second on
        prompt_length=10,
        queue_size=3,
    )
    # From random, as published. A start that no training improves on would be kept, with the gate as it was.
    training = TrainingOptions(steps=options.steps, eval_every=max(1, options.steps // 4), head_start="random")
    with ProgressBars(len(tasks), "images", console) as bars:
        run = LifelongTrainer(base, processor, config, tasks, training, options.out, listener=bars)
        metrics = run.run()
    console.print(summary_table(metrics))

    model = QTuningModel.from_pretrained(base, Path(options.out) / "adapter").eval()
    for task in tasks:
        model.set_task(task.name)
        pixels = processor(images=[open_image(task.test.inputs[0])], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            chances = model(pixel_values=pixels.to(model.device)).logits[0].softmax(-1)
        best = int(chances.argmax())
        console.print(f"{task.name}: {Path(task.test.inputs[0]).name} is {task.label_names[best]}, {chances[best]:.1%}")
    gates = {name: [float(alpha) for alpha in adapter.alphas] for name, adapter in model.adapters.items()}
    return metrics | {"gates": gates}


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
