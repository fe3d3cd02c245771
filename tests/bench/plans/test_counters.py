"""What Nsight Compute counts is read by kernel, and fits into the step."""

import subprocess

from qtuning_fast.bench.plans import counters, durations
from qtuning_fast.bench.plans.plan import PLANS

CSV = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","forward_kernel(int)","GPU Speed Of Light Throughput","Duration","usecond","12.5"
"0","1","forward_kernel(int)","Occupancy","Achieved Occupancy","%","24.1"
"1","1","forward_kernel(int)","GPU Speed Of Light Throughput","Duration","usecond","13.5"
"""


def test_the_counters_of_all_shapes_fit_into_their_step():
    [step] = [step for step in PLANS["gpu"] if step.name == "counters"]
    assert durations.IMPORTS + len(counters.MEASURED) * counters.SECONDS <= step.seconds


def test_counters_are_read_by_kernel_and_clocks_are_left_alone(monkeypatch):
    def run(command, **options):
        assert command[command.index("--clock-control") + 1] == "none"
        return subprocess.CompletedProcess(command, 0, stdout=CSV, stderr="")

    monkeypatch.setattr(counters.subprocess, "run", run)
    found = counters.counted("ncu", "bert-base")
    assert found["kernels"]["forward_kernel"] == {"Duration": "12.5 usecond", "Achieved Occupancy": "24.1 %"}
    assert found["kernels"]["forward_kernel 2"] == {"Duration": "13.5 usecond"}
    assert counters.read("nothing") == {}
