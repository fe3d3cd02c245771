"""Settings that are declared once: what is derived from a declaration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from qtuning_fast import QTuningConfig
from qtuning_fast.method.settings import check_integer, check_settings, documented, setting, settings_of


@documented
@dataclass(frozen=True)
class Oven:
    """What bakes."""

    shelves: int = setting(3, "Shelves.", "None is allowed.", least=0)
    heat: float = setting(180.0, "Degrees.")
    fan: str | None = setting("slow", "{choices}.", choices=("slow", "fast", None))
    trays: tuple[int, ...] | None = setting(None, "Trays.")


def test_a_declaration_gives_default_type_and_help() -> None:
    assert Oven() == Oven(3, 180.0, "slow", None)
    shelves, heat, fan, trays = settings_of(Oven)
    assert (shelves.name, shelves.kind, shelves.default, shelves.least) == ("shelves", int, 3, 0)
    assert (heat.kind, trays.kind) == (float, tuple[int, ...] | None)
    assert fan.help == "slow, fast or none." and fan.choices == ("slow", "fast", None)


def test_the_docstring_lists_the_settings() -> None:
    doc = Oven.__doc__ or ""
    assert doc.startswith("What bakes.\n\nArgs:\n    shelves: Shelves. None is allowed.\n    heat: Degrees.\n")
    assert "queue_size: Capacity in prompts. A prefix" in (QTuningConfig.__doc__ or "")


@pytest.mark.parametrize(
    ("oven", "error", "message"),
    [
        (Oven(shelves=-1), ValueError, "shelves is -1; it must be at least 0"),
        (Oven(shelves=True), TypeError, "shelves is True; it must be an integer"),
        (Oven(heat=math.nan), ValueError, "heat is nan; it must be finite and not negative"),
        (Oven(heat="hot"), TypeError, "heat is 'hot'; it must be a number"),  # type: ignore[arg-type]
        (Oven(fan="storm"), ValueError, "fan is 'storm'; it must be one of 'slow', 'fast', None"),
    ],
)
def test_wrong_values_are_refused_by_name(oven: Oven, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_settings(oven)


def test_right_values_pass() -> None:
    check_settings(Oven(shelves=0, heat=1, fan=None, trays=(1, 2)))
    check_integer("x", 2, 2)
