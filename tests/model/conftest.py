"""The families of small models are those of tests/integrations."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("families", Path(__file__).parents[1] / "integrations" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_families = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _families  # its dataclasses look there
_spec.loader.exec_module(_families)
family = _families.family
