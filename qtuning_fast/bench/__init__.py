"""The benchmarks. In a checkout they are in bench/ at its top; a wheel has here what `qtuning-fast bench` needs."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "bench")]
