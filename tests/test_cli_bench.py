"""`qtuning-fast bench`: what it prints and writes, and the options that it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qtuning_fast.cli import app

BAD_NUMBERS = ["abc", "1.5.2", "", "nan", "-3"]


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


TINY = ["--heads=4", "--kv-heads=2", "--head-size=16", "--batch=3", "--tokens=24", "--prefix-rows=13"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtuning_fast.bench import measure

    monkeypatch.setattr(measure, "in_a_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(measure, "QUICK", measure.QUICK._replace(rounds=2))


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", "--quick", *arguments])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80, result.output
    return result.output


@pytest.mark.usefixtures("in_this_process")
def test_bench_sets_what_auto_takes_beside_its_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "figures.json"
    monkeypatch.setattr("sys.argv", ["/bin/qtuning-fast", "bench", "--causal"])
    output = bench(*TINY, "--causal", "--tasks=2", f"--out={out}")
    assert "own: B3 Hq4 Hkv2 N24 D16 P13 causal 2 tasks, float32, training" in output
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert all(len(lines[peer]) > 2 for peer in ("eager", "sdpa"))
    assert "auto takes" in output and "not fused:" in output
    assert "PyTorch's attention without a gate." in " ".join(output.split())
    document = json.loads(out.read_text())
    entry = document["entries"]["own"]
    assert document["command"] == "qtuning-fast bench --causal" and document["versions"]["torch"]
    assert entry["rows"].keys() >= {entry["auto"]["backend"], "eager", "sdpa"} and entry["shape"]["is_causal"]


@pytest.mark.usefixtures("in_this_process")
def test_bench_of_a_model_decoding(tiny_model_folder: Path) -> None:
    sizes = ["--batch=2", "--context=40", "--prefix-rows=5", "--dtype=float64"]
    output = bench(f"--model={tiny_model_folder}", "--decode", *sizes)
    assert "B2 H4 N1 M40 D8 P5, float64, forward only" in output
    assert "the prefix in its cache." in " ".join(output.split()) and "backward" not in output.partition("peer")[2]


@pytest.mark.usefixtures("in_this_process")
def test_a_peer_that_cannot_do_it_says_why() -> None:
    output = " ".join(bench(*TINY, "--causal", "--peer=sdpa-cudnn").split())
    assert "NotImplementedError: cuDNN knows no bottom-right causality" in output
    assert "sdpa-cudnn – – – – – – –" in output


def test_an_interrupted_bench_ends_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtuning_fast.bench.layer_cost import LayerCase

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerCase, "measure", interrupted)
    code, output = call("bench", *TINY)
    assert code == 130 and output.endswith("Interrupted. Nothing is kept.")


WRONG_BENCH = {
    **{f"--{name}": [*BAD_NUMBERS, "0"] for name in ("batch", "tokens", "context", "prefix-rows", "tasks")},
    "--heads": [*BAD_NUMBERS, "0", "5"],  # of two key and value heads
    "--kv-heads": [*BAD_NUMBERS, "0", "3"],
    "--head-size": [*BAD_NUMBERS, "0"],
    "--batch ": ["99999999999"],
    "--tokens ": ["99999999999"],
    "--tasks ": ["4"],
    "--context ": ["23"],  # causal, and fewer than tokens
    "--padding": ["abc", "", "nan", "inf", "-0.1", "0.6"],
    "--dtype": ["int8", "", "Float32"],
    "--shape": ["tiny", "nowhere", ""],  # the first is known, but goes with no heads of one's own
    "--model": ["no/such/model", "/nowhere", ""],
    "--peer": ["nobody", ""],
    "--out": ["/dev/null", "/dev/null/x", "", "\x00"],
    "--colour": ["red"],
}


@pytest.mark.parametrize("option", WRONG_BENCH)
def test_what_bench_cannot_measure_is_refused_by_name(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qtuning_fast.bench.layer_cost import LayerCase

    monkeypatch.delattr(LayerCase, "measure")
    for value in WRONG_BENCH[option]:
        code, output = call("bench", *TINY, "--causal", f"{option.strip()}={value}")
        assert code == 2 and option.strip() in output and "Traceback" not in output, (option, value, output)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--model=x --shape=tiny", "--model and --shape"),
        ("--model=x --heads=2 --head-size=4", "--model and --heads"),
        ("--kv-heads=2", "--heads"),
        ("--head-size=4", "--heads"),
        ("--heads=4", "--head-size"),
        ("--decode --tokens=3", "--tokens"),
        ("--shape=tiny-bias --padding=0.2", "--padding"),
        ("--model=no/such/model", "'no/such/model'"),
        ("--model=/nowhere", "--model is '/nowhere'"),
        ("--model=", "--model is ''"),
        ("--shape=", "--shape is ''"),
        ("--shape=nowhere", "minilm-cpu"),
    ],
)
def test_options_of_bench_that_exclude_each_other(arguments: str, named: str) -> None:
    code, output = call("bench", *arguments.split())
    assert code == 2 and named in output, output
