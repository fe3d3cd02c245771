"""The table of rules by which auto orders the backends."""

import pytest

from qtuning_fast.attention import backend_order
from qtuning_fast.attention.backend_order import Rule

RULES = (
    Rule("cpu", "reference", most_scores=100, measured="this machine"),
    Rule("cpu", "composed", most_queries=2),
    Rule("cpu", "fused", least_keys=50),
    Rule("default", "reference"),
)


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ({"N": 5, "M": 2, "P": 3}, 0),  # 5 · (2 + 3) · 4 = 100 scores
        ({"N": 5, "M": 3, "P": 3}, None),
        ({"N": 2, "M": 99, "P": 3}, 1),
        ({"N": 3, "M": 50, "P": 3}, 2),
        ({"N": 3, "M": 49, "P": 3}, None),
    ],
)
def test_the_first_rule_whose_bounds_hold(make_call, call_of, monkeypatch, sizes, rule):
    monkeypatch.setattr(backend_order, "TABLE", RULES)
    call = call_of(make_call(B=1, **sizes))
    assert [*backend_order.rules_for(call)][:1] == ([] if rule is None else [RULES[rule]])
    order = [*dict.fromkeys(backend_order.in_order(call))]
    assert sorted(order) == sorted(backend_order.PREFERENCE)
    assert order[0] == ("fused" if rule is None else RULES[rule].backend)


def test_a_device_without_rules_of_its_own_gets_the_default(make_call, call_of, monkeypatch):
    monkeypatch.setattr(backend_order, "TABLE", RULES)
    monkeypatch.setattr(backend_order, "device_name", lambda device: "sm_123")
    assert [*backend_order.rules_for(call_of(make_call()))] == [RULES[-1]]


def test_the_table_is_read_and_rewritten_as_it_was(tmp_path, monkeypatch):
    text = backend_order.PATH.read_text()
    rules = backend_order.TABLE
    assert {rule.backend for rule in rules} <= set(backend_order.PREFERENCE) and "default" in {r.device for r in rules}
    monkeypatch.setattr(backend_order, "PATH", tmp_path / "backend_order.json")
    backend_order.write(rules)
    assert backend_order.PATH.read_text() == text and backend_order.read() == rules
