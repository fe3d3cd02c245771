"""What kernels run on."""

import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 at import: on the CPU, as NumPy


def current_target() -> str:
    """The architecture that kernels are compiled for: "sm_90", "gfx942", or "interpreter"."""
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
