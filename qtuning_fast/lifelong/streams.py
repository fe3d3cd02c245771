"""All streams by name."""

from __future__ import annotations

from typing import Any

from qtuning_fast.lifelong.image_benchmarks import EVERY, IMAGE_BENCHMARKS
from qtuning_fast.lifelong.image_streams import IMAGE_STREAMS
from qtuning_fast.lifelong.stream import AnyStream
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.lifelong.text_streams import TEXT_STREAMS

STREAMS: dict[str, AnyStream] = {**TEXT_STREAMS, **IMAGE_STREAMS, **IMAGE_BENCHMARKS}


def defaults_in_words(name: str, own: Any) -> str:
    """Say the default of a setting that a stream may have its own of.

    Args:
        name: of the setting, as streams have it.
        own: its default where there is no stream.
    """
    others: dict[Any, list[str]] = {}
    for stream, each in STREAMS.items():
        if getattr(each, name) != own:
            others.setdefault(getattr(each, name), []).append(stream)
    words = [f"for {', '.join(streams)} {'all' if value == EVERY else value}" for value, streams in others.items()]
    return "; ".join([f"default {own}", *words])


def load_stream(
    name: str,
    *,
    shots: int | None = None,
    validation_shots: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    data: str | None = None,
) -> list[Task]:
    """Load the tasks of a stream in order; `few_shot_split` draws them.

    Args:
        name: one of `STREAMS`.
        shots, validation_shots: examples a class; None takes the stream's own numbers, of texts 16.
        test_size: test examples a task, at most; None takes the stream's own number, of texts 200.
        seed: of the draw, and of a benchmark's order of classes.
        data: a folder with a copy of a benchmark's data (`qtuning_fast.lifelong.image_benchmarks`); None: the hub.

    Raises:
        ValueError: no stream has this name, a class has too few examples for this many shots, or the stream has data of
            its own.
        ImportError: a package that holds the examples, or that reads them, is not installed.
        ConnectionError: the hub does not answer.
        FileNotFoundError: the installed version of a package, or the folder, lacks the examples.
    """
    if name not in STREAMS:
        raise ValueError(f"there is no stream {name!r}; the streams are {', '.join(STREAMS)}")
    return STREAMS[name].load(shots=shots, validation_shots=validation_shots, test_size=test_size, seed=seed, data=data)
