"""Finds the way of a program's warps through SASS from how often its loops run."""

from collections.abc import Sequence
from dataclasses import dataclass

from qtuning_fast.bench.predictions.sass import Code, CodeError, Loop


@dataclass(frozen=True)
class Trace:
    """The instructions that a warp executes, by index, and the ends of iterations among them."""

    indexes: tuple[int, ...]
    ends: dict[int, int]  # a position in `indexes`, and the loop by its number
    nothing: frozenset[int]  # positions of copies that are switched off: of iterations that do not come


def trace(code: Code, loops: Sequence[Loop], times: Sequence[int], at_most: int) -> Trace:
    """The way through the code that runs loops so often, but none more than `at_most`; 0: it is not even entered.

    Of a branch forward it is known to which loops it leads: it is taken to reach those that run, or around those that
    do not, or around a subroutine; else not. Raises CodeError.
    """
    whole, times = times, [min(count, at_most) for count in times]
    ahead = _loops_ahead(code, loops)
    copies = [_copies_ahead(code, loops, loop) for loop in loops]
    ran = set()
    passed = [0] * len(loops)  # copies before a loop since it ended last
    nothing: set[int] = set()
    done = [0] * len(loops)
    by_end = {loop.last: number for number, loop in enumerate(loops)}
    indexes: list[int] = []
    ends: dict[int, int] = {}
    at = 0
    while at < len(code.instructions):
        one = code.instructions[at]
        if len(indexes) > 400_000:
            raise CodeError("no way to the end of the code was found")
        if one.base == "LDGSTS":
            for number, (before, inside) in enumerate(copies):
                if at in before:
                    stage = passed[number] // max(inside, 1)
                    passed[number] += 1
                elif loops[number].first <= at <= loops[number].last and before:
                    stage = done[number] + len(before) // max(inside, 1)
                else:
                    continue
                if stage >= whole[number]:
                    nothing.add(len(indexes))
        indexes.append(at)
        if one.base == "EXIT" and one.predicate == "":
            if missed := [loops[number] for number, count in enumerate(times) if count and number not in ran]:
                raise CodeError(f"no way was found that runs {missed[0]}")
            return Trace(tuple(indexes), ends, frozenset(nothing))
        if not one.branches or one.target is None:
            at += 1
        elif at in by_end:
            number = by_end[at]
            done[number] += 1
            ran.add(number)
            ends[len(indexes) - 1] = number
            for inner, loop in enumerate(loops):  # those within start anew
                if loops[number].first <= loop.first and loop.last < loops[number].last:
                    done[inner] = passed[inner] = 0
            again = done[number] < times[number] or one.predicate == ""
            at = one.target if again else at + 1
        elif one.predicate == "":
            at = one.target
        elif one.target <= at:
            at += 1
        else:
            at = one.target if _taken(code, loops, times, done, ahead, at, one.target) else at + 1
    raise CodeError("the code has no end")


def _copies_ahead(code: Code, loops: Sequence[Loop], loop: Loop) -> tuple[frozenset[int], int]:
    """The asynchronous copies before a loop, which start its first iterations, and the number of those in it."""
    start = max((other.last for other in loops if other.last < loop.first), default=-1) + 1
    copies = [index for index, one in enumerate(code.instructions) if one.base == "LDGSTS"]
    inside = sum(loop.first <= index <= loop.last for index in copies)
    return frozenset(index for index in copies if start <= index < loop.first) if inside else frozenset(), inside


def _taken(
    code: Code,
    loops: Sequence[Loop],
    times: Sequence[int],
    done: Sequence[int],
    ahead: Sequence[int],
    at: int,
    target: int,
) -> bool:
    """Whether a branch forward is taken: towards loops that still have to run, or around those that do not."""
    for number, loop in enumerate(loops):
        if loop.first <= at <= loop.last < target and code.instructions[loop.last].predicate == "":
            return done[number] >= times[number]  # the way out of a loop that tests first
    only_there, only_here = ahead[target] & ~ahead[at + 1], ahead[at + 1] & ~ahead[target]
    runs = sum(1 << number for number, count in enumerate(times) if done[number] < count)
    never = sum(1 << number for number, count in enumerate(times) if not count)
    if bool(only_there & runs) != bool(only_here & runs):
        return bool(only_there & runs)
    if bool(only_there & never) != bool(only_here & never):
        return bool(only_here & never)
    return any(code.instructions[index].base == "CALL" for index in range(at + 1, target))


def _loops_ahead(code: Code, loops: Sequence[Loop]) -> list[int]:
    """The loops that can be reached from each instruction without going back, one bit each."""
    ends = {loop.last: 1 << number for number, loop in enumerate(loops)}
    found = [0] * (len(code.instructions) + 1)
    for index in range(len(code.instructions) - 1, -1, -1):
        one = code.instructions[index]
        goes_on = one.predicate != "" or (one.base != "EXIT" and not one.branches)
        found[index] = ends.get(index, 0) | (found[index + 1] if goes_on else 0)
        if one.branches and one.target is not None and one.target > index:
            found[index] |= found[one.target]
    return found


def before_loops(code: Code, loops: Sequence[Loop]) -> frozenset[int]:
    """Instructions that belong to no loop and do not start one by copying ahead."""
    within = {index for loop in loops for index in range(loop.first, loop.last + 1)}
    for loop in loops:
        within |= _copies_ahead(code, loops, loop)[0]
    return frozenset(range(len(code.instructions))) - within
