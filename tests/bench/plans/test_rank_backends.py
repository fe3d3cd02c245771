"""The rules that are written are those that the figures ask for."""

import json

import pytest

from qtuning_fast.attention import backend_order
from qtuning_fast.attention.backend_order import Rule
from qtuning_fast.bench.peers import Peer
from qtuning_fast.bench.plans import rank_backends
from qtuning_fast.bench.plans.rank_backends import Point, crossing, rules
from qtuning_fast.bench.shapes import TINY


def points(*times, names=("composed", "fused")):
    return [Point(size, TINY, dict(zip(names, ms))) for size, *ms in times]


ON_CPU = ("native", "composed", "reference")


@pytest.mark.parametrize(
    ("measured", "bound"),
    [
        (points((100, 2.0, 1.0), (400, 1.0, 2.0)), 200),
        (points((100, 1.0, 2.0), (400, 2.0, 1.0), (900, 1.0, 2.0), (1600, 1.0, 2.0)), 600),
        (points((100, 1.0, 1.0)), 0),
        (points((100, 2.0, 1.0)), 200),
    ],
    ids=["one crossing", "the last of two", "never slower", "always slower"],
)
def test_the_bound_lies_where_a_backend_is_last_slower(measured, bound):
    assert crossing(measured, "composed", "fused") == bound


def test_on_a_cpu_the_reference_does_what_is_small():
    measured = points((100, 2.0, 3.0, 1.0), (400, 1.0, 3.0, 2.0), (1600, 1.0, 2.0, 3.0), names=ON_CPU)
    few = [*rank_backends.FEW_ON_CPU]
    small, *others = rules("cpu", measured, "here")
    assert (small.backend, small.most_scores) == ("reference", 200) and others[:3] == few
    assert [(r.backend, r.most_scores) for r in others[3:]] == [
        ("native", None),
        ("reference", 800),
        ("composed", None),
    ]
    always = points((100, 1.0, 2.0, 3.0), names=ON_CPU)
    both = [Rule("cpu", name, measured="here") for name in ("native", "composed")]
    assert rules("cpu", always, "here") == [*few, *both]


def test_on_a_gpu_the_composed_backend_does_what_is_long_and_decoding(monkeypatch):
    monkeypatch.setattr(backend_order, "device_name", lambda device: "sm_90")
    found = rules("cuda", points((128, 2.0, 1.0), (512, 1.0, 2.0)), "there")
    assert [(r.device, r.backend, r.most_queries, r.least_keys) for r in found] == [
        ("sm_90", "composed", rank_backends.FEW_QUERIES, None),
        ("sm_90", "composed", None, 256),
        ("sm_90", "fused", None, None),
    ]
    assert not found[0].measured and found[1].measured == "there"


def test_a_run_replaces_the_lines_of_its_device_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backend_order, "PATH", tmp_path / "backend_order.json")
    monkeypatch.setattr(
        backend_order, "TABLE", (Rule("cpu", "fused"), Rule("sm_1", "composed"), Rule("default", "fused"))
    )
    monkeypatch.setattr(rank_backends.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rank_backends, "training_shapes", lambda device: [TINY])
    out = tmp_path / "new" / "rank_backends.json"
    assert (
        rank_backends.main(["--rounds", "1", "--dry-run", "--out", str(out)]) == 0 and not backend_order.PATH.exists()
    )
    assert rank_backends.main(["--rounds", "1", "--out", str(out)]) == 0
    written = backend_order.read()
    assert [rule.device for rule in written if rule.device != "cpu"] == ["sm_1", "default"]
    assert any("torch" in rule.measured for rule in written if rule.device == "cpu")
    assert written[0].device == "cpu" and written[-1] == Rule("default", "fused")
    assert len(json.loads(out.read_text())["entries"]) == 1


def test_what_fails_is_said_and_writes_no_rule(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backend_order, "PATH", tmp_path / "backend_order.json")
    monkeypatch.setattr(rank_backends.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rank_backends, "training_shapes", lambda device: [TINY])

    def broken(call):
        raise RuntimeError("out of order")

    monkeypatch.setitem(rank_backends.PEERS, "composed", Peer("", broken))
    assert (
        rank_backends.main(["--rounds", "1", "--out", str(tmp_path / "rank_backends.json")]) == 1
        and not backend_order.PATH.exists()
    )
    assert "left out, RuntimeError: out of order" in capsys.readouterr().out
