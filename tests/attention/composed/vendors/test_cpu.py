"""PyTorch's flash attention for CPUs: both passes, as the composed backend calls them."""

from __future__ import annotations

from qtuning_fast.attention.composed.vendors import CPU_FLASH

VENDORS = [CPU_FLASH]


def test_the_cpus_own_is_exact(calls, vendor, case):
    calls.assert_right(vendor, calls.real_call(**calls.CASES[case]), 1e-12, 1e-12)
