"""What `torch.compile` is told of this package."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Marks a function whose result never changes in a process: it is called while tracing, and not looked into.

    What torch.compiler.assume_constant_result does, without importing the compiler, and Triton, for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
