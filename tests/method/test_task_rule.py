"""What a rule is without its own: its features, its settings; and scores that move to a device."""

from __future__ import annotations

import pytest
import torch

from qtuning_fast.method.statistics import Recorder
from qtuning_fast.method.task_rule import Candidate, Evidence, TaskRule
from qtuning_fast.method.task_rules import ClosedForm, RanPAC


def test_a_rule_of_ones_own_reads_features_as_they_are() -> None:
    rule, x = TaskRule(), torch.randn(2, 3)
    assert rule.map(x) is x and rule.maps == rule.settings == {} and not rule.has_own_features
    assert rule.needs_statistics
    with pytest.raises(NotImplementedError):
        rule.fit([])


def test_scores_move_to_a_device_with_all_they_hold() -> None:
    rule = RanPAC(size=6)
    recorder = Recorder(3, {rule.feature_map: rule.map})
    recorder.add(torch.randn(9, 2), torch.arange(9) % 3)
    known = [Candidate("a", 3, recorder.finish([]))]
    for scores in (rule.fit(known), ClosedForm().fit(known)):
        moved = scores.to(torch.device("meta"))  # type: ignore[attr-defined]
        assert moved(Evidence(torch.zeros(4, 2, dtype=torch.float64, device="meta"), dict)).device.type == "meta"
