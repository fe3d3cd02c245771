"""One direction of the attention kernels by itself, to compare the results of blocks and to time them."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from qtuning_fast.attention.arguments import trainable
from qtuning_fast.bench.shapes import Inputs, Shape
from qtuning_fast.kernels import backward, forward, prefix_forward, prefix_part
from qtuning_fast.kernels.blocks import Blocks, instead
from qtuning_fast.kernels.fold import folded
from qtuning_fast.kernels.launch import Launch


class Pass:
    """One direction on one set of inputs. The passes before it have run, and its results have room.

    The two directions that only see the prefix, "merge" and "prefix-queries", add to what they are given. That starts
    at 0, as attention to a context of one key with a value of 0.
    """

    def __init__(self, shape: Shape, x: Inputs, direction: str) -> None:
        self.direction, self.d_output = direction, x.d_output
        self.call = x.call(shape)
        self.as_seen, folding = folded(self.call)
        self.outputs = forward.empty_outputs(self.call)
        self.gradients = backward.rooms(self.call, trainable(self.call))
        for launch in (*folding, forward.launch(self.as_seen, *self.outputs)):
            launch.run()

    def launches(self, entry: Blocks) -> list[Launch]:
        """The launches that are timed. The keys come with the launch after them, whose work depends on their blocks."""
        with instead(entry):
            if self.direction == "forward":
                return [forward.launch(self.as_seen, *self.outputs)]
            if self.direction == "merge":
                return [prefix_forward.launch(self.as_seen, *self.outputs)]
            if self.direction == "prefix-queries":
                d_query = self.gradients["query"]
                launches = prefix_part.launches(self.call, *self.outputs, self.d_output, d_query, gradients={})
            else:
                launches = backward.launches(self.call, *self.outputs, self.d_output, self.gradients)
            folding, *rest = launches
        folding.run()
        if self.direction == "whole":  # one launch and the sum of its parts or, where that is off, three
            return rest
        queries, *others = rest
        if self.direction in ("queries", "prefix-queries"):
            return [queries]
        queries.run()  # writes the delta that the others read
        return others

    def results(self, launches: Sequence[Launch]) -> dict[str, Tensor]:
        """The tensors that the launches write."""
        if self.direction in ("forward", "merge"):
            return {"output": self.outputs[0], "lse": self.outputs[1]}
        if self.direction in ("queries", "prefix-queries"):
            return {"delta": launches[0].arguments["per_query"].delta, "query": self.gradients["query"]}
        return {name: x for name, x in self.gradients.items() if name != "query" or self.direction == "whole"}

    def compute(self, entry: Blocks) -> dict[str, Tensor]:
        """The results with an entry's blocks. What it does not write is NaN, or 0 where it adds to what is there."""
        launches = self.launches(entry)
        results = self.results(launches)
        parts = [x for each in launches for x in each.arguments.get("parts") or () if isinstance(x, Tensor)]
        for x in (*results.values(), *parts):
            x.fill_(0.0 if self.direction in ("merge", "prefix-queries") else math.nan)
        for launch in launches:
            launch.run()
        return {name: x.clone() for name, x in results.items()}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest ‖found − expected‖ / ‖expected‖ and the name of that result; NaN counts as infinite."""
    ratios = {}
    for name, x in expected.items():
        ratio = ((found[name].float() - x.float()).norm() / x.float().norm()).item()
        ratios[name] = math.inf if math.isnan(ratio) else ratio
    worst = max(ratios, key=ratios.__getitem__)
    return ratios[worst], worst
