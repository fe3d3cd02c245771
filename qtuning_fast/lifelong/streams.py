"""All streams by name."""

from __future__ import annotations

from qtuning_fast.lifelong.image_streams import IMAGE_STREAMS
from qtuning_fast.lifelong.stream import Stream
from qtuning_fast.lifelong.tasks import Task
from qtuning_fast.lifelong.text_streams import TEXT_STREAMS

STREAMS: dict[str, Stream] = TEXT_STREAMS | IMAGE_STREAMS


def load_stream(
    name: str,
    *,
    shots: int | None = None,
    validation_shots: int | None = None,
    test_size: int = 200,
    seed: int = 0,
) -> list[Task]:
    """Load the tasks of a stream in order; `few_shot_split` draws them.

    Args:
        name: one of `STREAMS`.
        shots, validation_shots: examples a class; None takes the stream's own number, of texts 16.
        test_size: test examples a task, at most.
        seed: of the draw.

    Raises:
        ValueError: no stream has this name, or a class has too few examples for this many shots.
        ImportError: a package that holds the examples is not installed.
        FileNotFoundError: the installed version of a package lacks them.
    """
    if name not in STREAMS:
        raise ValueError(f"there is no stream {name!r}; the streams are {', '.join(STREAMS)}")
    return STREAMS[name].load(shots=shots, validation_shots=validation_shots, test_size=test_size, seed=seed)
