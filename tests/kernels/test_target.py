"""The name of what kernels run on."""

from types import SimpleNamespace

import pytest

from qtuning_fast.kernels import target


class Driver:
    """One of Triton's, with one device; notes how often its target is asked for."""

    def __init__(self, backend, arch):
        self.target, self.asked = SimpleNamespace(backend=backend, arch=arch), 0

    def get_current_device(self):
        return 0

    def get_current_target(self):
        self.asked += 1
        return self.target


@pytest.mark.parametrize(
    ("backend", "arch", "name"), [("cuda", 90, "sm_90"), ("cuda", 100, "sm_100"), ("hip", "gfx942", "gfx942")]
)
def test_a_device_is_asked_once_for_its_architecture(monkeypatch, backend, arch, name):
    driver = Driver(backend, arch)
    monkeypatch.setattr(target, "INTERPRETED", False)
    monkeypatch.setattr(target.triton.runtime, "driver", SimpleNamespace(active=driver))
    assert [target.current_target() for _ in range(3)] == [name] * 3 and driver.asked == 1


def test_the_interpreter_is_one_of_its_own(monkeypatch):
    monkeypatch.setattr(target, "INTERPRETED", True)
    assert target.current_target() == "interpreter"
