"""Decoding is measured against the same attention with the prefix in the cache."""

import json

import pytest
import torch

from qtuning_fast.bench import decode
from qtuning_fast.bench.decode import Decoding, expanded_cache, inputs, measure, ours

SMALL = {"B": 6, "Hq": 4, "Hkv": 2, "D": 16, "M": 9, "P": 5}


@pytest.mark.parametrize("tasks", [1, 3])
def test_peers_do_the_same_work(tasks):
    x = inputs(Decoding(**SMALL, tasks=tasks), torch.float32, "cpu", seed=0)
    torch.testing.assert_close(ours("composed", None, x)(), expanded_cache(x)())
    assert not torch.allclose(ours("composed", "tanh", x)(), expanded_cache(x)())
    if tasks > 1:
        assert sorted(x.prefix_index.tolist()) == [0, 0, 1, 1, 2, 2] != x.prefix_index.tolist()


def test_bytes_are_counted_once():
    assert Decoding(**SMALL, tasks=1).needed_bytes(4) == (2 * 2 * (6 * 9 + 5) + 2 * 6 * 4) * 16 * 4
    assert Decoding(**SMALL, tasks=3).needed_bytes(2) == (2 * 2 * (6 * 9 + 15) + 2 * 6 * 4) * 16 * 2


def test_a_wrong_backend_is_not_timed(monkeypatch):
    right = decode.ours
    monkeypatch.setattr(decode, "ours", lambda name, gate, x: lambda: right(name, gate, x)() * 0.5)
    with pytest.raises(AssertionError, match="composed is not the peer's attention"):
        measure(Decoding(**SMALL, tasks=1), "cpu", 1, 1e9)


def test_a_run_ends_in_a_file_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "ON_CPU", (Decoding(**SMALL, tasks=1), Decoding(**SMALL, tasks=3)))
    monkeypatch.setattr(decode, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(decode, "device_facts", lambda device: (None, {"torch": "1"}))
    monkeypatch.setattr(decode.torch.cuda, "is_available", lambda: False)
    out = tmp_path / "new" / "decode.json"
    assert decode.main(["--rounds", "2", "--out", str(out)]) == 0
    shapes = json.loads(out.read_text())["shapes"]
    assert [s["shape"]["tasks"] for s in shapes] == [1, 3] and "composed" in shapes[0]["rows"]
    text = capsys.readouterr().out
    assert "3 tasks" in text and "sdpa-expanded-cache" in text and max(map(len, text.splitlines())) <= 120
    assert decode.main(["--batch", "7", "--out", str(out)]) == 0 and "3 tasks" not in capsys.readouterr().out
