"""Decoding: one new token for each of many sequences that share a prefix, or use several in no order.

    python -m qtuning_fast.bench.rows.decode
    python -m qtuning_fast.bench.rows.decode --shape decode-64 --peer composed sdpa-no-concat

The peer to beat is `sdpa-no-concat`: PyTorch's attention, without a gate, whose cache already holds the prefix in front
of every sequence's context. The floor counts each byte that is needed once. Options and table as in `bench.attention`.
"""

import sys

from qtuning_fast.bench.rows.attention import ask


def main(arguments: list[str] | None = None) -> int:
    return ask("decode", __doc__, arguments, trained=False)


if __name__ == "__main__":
    sys.exit(main())
