"""The rules by which "auto" chooses a backend, in the table backend_order.json.

`python -m qtuning_fast.bench.plans.rank_backends` measures the table.

A device in the table has its own rules; other devices use those of "default". The first rule whose bounds a call meets
applies. Bounds depend on shapes alone, so the same shapes always get the same backend. If that backend cannot compute
a call, the next rule that applies decides, and after the last one the order of PREFERENCE.

The default rules are not measured. They follow what is known of attention on GPUs: a single launch wins for short
sequences, vendors' kernels win from some thousand keys on, and decoding, with its few queries, should read a prefix
once for all samples.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qtuning_fast.attention.arguments import PrefixAttentionCall
from qtuning_fast.attention.common import constant

PATH = Path(__file__).with_name("backend_order.json")
PREFERENCE = ("fused", "native", "composed", "reference")
DEFAULT = "default"


@dataclass(frozen=True)
class Rule:
    """One line of the table. None means no bound."""

    device: str  # "cpu", "sm_90", "gfx942"; "default" for GPUs without measurements
    backend: str
    most_scores: int | None = None  # B · Hq · N · (P + M)
    most_queries: int | None = None  # N
    least_keys: int | None = None  # M
    measured: str = ""  # device and versions of the measurement; empty: not measured

    def holds(self, call: PrefixAttentionCall) -> bool:
        """Return whether a call meets the rule's bounds."""
        if torch.compiler.is_exporting():  # sizes may be dynamic, and a comparison would bound them
            return self.most_scores is None and self.most_queries is None and self.least_keys is None
        if call.is_packed and self.backend == "reference":
            return False  # it computes the sequences one by one
        (B, N, M), Hq, P = call.counts, call.query.shape[1], call.prefix_key.shape[-2]
        return (
            (self.most_scores is None or B * Hq * N * (P + M) <= self.most_scores)
            and (self.most_queries is None or N <= self.most_queries)
            and (self.least_keys is None or M >= self.least_keys)
        )

    def __str__(self) -> str:
        bounds = {
            "scores at most": self.most_scores,
            "queries at most": self.most_queries,
            "context keys at least": self.least_keys,
        }
        said = ", ".join(f"{name} {bound:,}" for name, bound in bounds.items() if bound is not None) or "any sizes"
        by = f"measured on {self.measured}" if self.measured else "not measured"
        return f"on {self.device}, {said} ({by})"


def read() -> tuple[Rule, ...]:
    return tuple(Rule(**rule) for rule in json.loads(PATH.read_text()))


TABLE = read()


def write(rules: Iterable[Rule]) -> None:
    """Write the table, one rule a line, in the order in which rules are tried."""
    lines = [json.dumps({name: x for name, x in asdict(rule).items() if x not in (None, "")}) for rule in rules]
    PATH.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n")


def rules_for(call: PrefixAttentionCall) -> Iterator[Rule]:
    """Yield the rules that apply to a call, the first before the others."""
    device = device_name(call.query.device)
    if all(rule.device != device for rule in TABLE):
        device = DEFAULT
    return (rule for rule in TABLE if rule.device == device and rule.holds(call))


@constant
def device_name(device: torch.device) -> str:
    """Return a device's name in the table."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def in_order(call: PrefixAttentionCall) -> Iterator[str]:
    """Yield all backends in the order in which "auto" tries them for a call; some occur again."""
    yield from (rule.backend for rule in rules_for(call))
    yield from PREFERENCE
