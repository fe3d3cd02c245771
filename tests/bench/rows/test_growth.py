"""A series varies one size; each size is a unit of its own."""

from qtuning_fast.bench.plans.schedule import DONE, Schedule
from qtuning_fast.bench.rows import growth
from qtuning_fast.bench.rows.growth import GROWTH_TURNS, SERIES, units
from qtuning_fast.bench.timing import Turns


def test_a_series_varies_one_size():
    for name, series in SERIES.items():
        for device in ("cpu", "cuda"):
            shapes = series.shapes(device, tiny=False)
            assert [getattr(shape, name) for shape in shapes.values()] == list(shapes)
            others = [{k: v for k, v in vars(s).items() if k not in (name, "name")} for s in shapes.values()]
            assert all(each == others[0] for each in others)
    assert not SERIES["tasks"].base.trained


def test_what_grows_takes_longer():
    found = units("N", SERIES["N"].shapes("cuda", tiny=False), ["fused", "eager"], GROWTH_TURNS)
    assert [unit.name for unit in found][:2] == ["N=128", "N=256"] and found[-1].seconds > found[0].seconds > 0


def test_a_size_that_an_earlier_process_has_measured_is_kept():
    shapes = SERIES["P"].shapes("cpu", tiny=True)
    schedule = Schedule(log={"P=2": {"status": DONE, "expected": 1.0, "took": 1.0}})
    known = {"points": {"2": {"composed": "kept"}}}
    found = growth.measure("P", shapes, ["composed"], "cpu", Turns(rounds=1), schedule=schedule, known=known)
    assert found["points"]["2"] == {"composed": "kept"} and found["points"]["3"]["composed"]["step"]["eager"]
