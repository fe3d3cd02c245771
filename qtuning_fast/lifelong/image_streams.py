"""Streams of tasks from real images, without downloads; the classes of each task are fixed here."""

from __future__ import annotations

from functools import partial

from qtuning_fast.lifelong.data.packaged_images import animal_silhouettes, clipart
from qtuning_fast.lifelong.stream import Stream, TaskSource

_IMAGES = "image-classification"

# The kinds of each group with the most drawings.
CLIPART = {
    "animals": ("birds", "bugs", "mammals"),  # left out: fish (17 different drawings)
    "food": ("beverages", "desserts", "fruit", "meats_and_eggs"),
    "recreation": ("music", "party", "sports", "toys"),
    "signs_and_symbols": ("flags", "led", "map_symbols", "weather"),
    "people": ("bodypart", "clothing", "smilies", "stickmen"),
    "transportation": ("aiga-symbols", "boating", "roadsigns", "vehicles"),
    "computer": ("buttons", "hardware", "icons"),
    "shapes": ("arrows", "callouts", "flowchart", "jigsaw"),
}
ANIMAL_PAIRS = (("bear", "bird"), ("cat", "cow"), ("dog", "elephant"), ("giraffe", "horse"), ("sheep", "zebra"))

IMAGE_STREAMS = {
    "clipart-8": Stream(
        "eight tasks of drawings: animals, food, recreation, signs, people, transport, computers, shapes",
        tuple(
            TaskSource(group, "Open Clip Art Library, in openclipart-png", kinds, partial(clipart, group, kinds))
            for group, kinds in CLIPART.items()
        ),
        validation_shots=3,  # clothing has 25 different drawings
        task_type=_IMAGES,
    ),
    "animals-5": Stream(
        "five tasks of two animals each: silhouettes, quick to learn",
        tuple(
            TaskSource("-".join(pair), "Animal-Shape, in animal-mnist", pair, animal_silhouettes)
            for pair in ANIMAL_PAIRS
        ),
        queue_size=3,
        task_type=_IMAGES,
    ),
}
