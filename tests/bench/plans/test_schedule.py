"""What still fits begins, what killed a process does not begin again, and the log says what each unit took."""

from qtuning_fast.bench.plans.schedule import DIED, DONE, NO_TIME, SLOWEST, UNDER_WAY, Schedule


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_unit_begins_if_it_ends_before_the_deadline():
    clock, written = Clock(), []
    schedule = Schedule(10.0, clock=clock, write=lambda: written.append(dict(schedule.log)))
    assert schedule.may_begin("a", 4.0) and schedule.status("a") == UNDER_WAY
    clock.now = 5.0
    assert not schedule.may_begin("b", 6.0) and schedule.may_begin("c", 5.0)
    clock.now = 9.0
    schedule.end()
    assert {name: schedule.status(name) for name in "abcd"} == {"a": DONE, "b": NO_TIME, "c": DONE, "d": ""}
    assert schedule.log["a"] == {"status": DONE, "expected": 4.0, "took": 5.0} and len(written) >= 4


def test_a_unit_leaves_room_for_what_must_follow_it():
    schedule = Schedule(10.0, clock=Clock())
    assert not schedule.may_begin("row", 6.0, 5.0) and schedule.may_begin("other row", 5.0, 5.0)


def test_what_an_earlier_process_did_is_not_done_again_and_what_it_had_no_time_for_may_be():
    log = {"a": {"status": DONE, "expected": 1, "took": 1}, "b": {"status": UNDER_WAY, "expected": 1, "took": None}}
    log["c"] = {"status": NO_TIME, "expected": 1, "took": None}
    schedule = Schedule(log=log)
    assert [unit for unit in "abcd" if schedule.may_begin(unit, 1.0)] == ["c", "d"]
    assert schedule.status("b") == DIED


def test_a_machine_that_is_slower_than_expected_is_given_less_to_do():
    clock = Clock()
    schedule = Schedule(100.0, clock=clock)
    for unit in "abc":
        assert schedule.may_begin(unit, 10.0)
        clock.now += 20.0
    assert not schedule.may_begin("d", 21.0) and schedule.may_begin(
        "e", 19.0
    )  # 40 seconds are left, and all take twice as long
    clock.now += 1000.0
    schedule.end()
    schedule.deadline = clock.now + SLOWEST * 2.0
    assert schedule.may_begin("f", 2.0) and not schedule.may_begin("g", 2.1)
