"""`make bench` measures what it says, and nobody who is wrong."""

import json
from pathlib import Path

import pytest

from qtuning_fast.bench.peers import PEERS, Peer
from qtuning_fast.bench.rows.short import OURS

ROOT = Path(__file__).parents[3]
TIMED = 2 * len([*OURS, "eager", "sdpa"])  # forward and step of each


@pytest.fixture(autouse=True)
def not_among_workers(monkeypatch):
    """pytest-benchmark takes no times beside other processes of pytest."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


def short(*arguments):
    """By a pytest within this one, on the tiny shape."""
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    return pytest.main([str(ROOT / "bench" / "rows" / "short.py"), "-q", "-k", "tiny", *plugins, *arguments])


def test_everyone_is_right_before_being_timed(capsys):
    assert short("--benchmark-disable") == 0
    assert f"{TIMED} passed" in capsys.readouterr().out


def test_a_wrong_peer_fails(monkeypatch, capsys):
    right = PEERS["eager"].attend
    monkeypatch.setitem(PEERS, "eager", Peer("", lambda call: right(call) * 0.5))
    assert short("--benchmark-disable") == 1
    text = capsys.readouterr().out
    assert "eager: wrong: output is off by 0.5" in text and f"2 failed, {TIMED - 2} passed" in text


@pytest.mark.thorough
def test_figures_are_kept_with_errors_and_work(tmp_path, capsys):
    out = tmp_path / "figures.json"
    brief = ["--benchmark-min-rounds=1", "--benchmark-max-time=0", f"--benchmark-json={out}"]
    assert short(*brief) == 0
    found = json.loads(out.read_text())["benchmarks"]
    assert {each["group"].split(":")[0] for each in found} == {"tiny, forward", "tiny, step"}
    for each in found:
        assert each["extra_info"]["largest_error"] < 0.05 and each["extra_info"]["flops"] > 0
