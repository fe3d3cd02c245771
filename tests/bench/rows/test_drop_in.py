"""Cases of a question do the same work, and what each saves stands beside it."""

from qtuning_fast.bench.rows import drop_in, tables
from qtuning_fast.bench.rows.drop_in import questions
from qtuning_fast.bench.rows.roofline import forward_work
from qtuning_fast.bench.timing import Turns


def test_each_question_compares_what_has_to_be_done():
    for device in ("cpu", "cuda"):
        asked = questions(device)
        window, bare = (asked["window"].cases[name][0] for name in ("window", "as many scores"))
        work = forward_work(window).flops / forward_work(bare).flops
        assert 0.98 < work <= 1  # the first and the last queries see fewer keys
        packed, padded = (asked["packed"].cases[name][0] for name in ("packed", "padded"))
        assert packed.lengths == padded.lengths and packed.packed and not padded.packed
        assert abs(sum(packed.lengths) / (packed.B * packed.M) - 1 / 3) < 0.03
        assert all(question.over in question.cases for question in asked.values())


def test_ratios_are_over_the_case_that_is_named():
    entry = drop_in.measure(questions("cpu", tiny=True)["packed"], "cpu", Turns(rounds=2))
    assert entry["rows"]["padded"]["step"]["eager"] and not entry["rows"]["packed"]["error"]
    said = tables.drop_in(entry)
    assert "over padded" in said and "packed, flex-frozen-gate: " in said  # which cannot train on a CPU
    [line] = [line for line in said.splitlines() if line.strip().startswith("padded ")]
    assert line.endswith("1.00")
