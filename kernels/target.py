"""The device that kernels run on."""

from functools import cache
from typing import Any

import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 at import: kernels run on the CPU in NumPy


def current_target() -> str:
    """Return the architecture that kernels are compiled for: "sm_90", "gfx942" or "interpreter"."""
    if INTERPRETED:
        return "interpreter"
    driver = triton.runtime.driver.active
    return _target(driver, driver.get_current_device())


@cache
def _target(driver: Any, device: int) -> str:
    """Return the architecture of the driver's current device, cached because the query takes microseconds."""
    target = driver.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
