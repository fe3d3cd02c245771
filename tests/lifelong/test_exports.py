"""The public names of qtuning_fast.lifelong: importable from there, listed, loaded on first use."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qtuning_fast import lifelong

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "lifelong.md"


@pytest.mark.parametrize("name", lifelong.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(lifelong, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'qtuning_fast\.lifelong' has no attribute 'colour'"):
        _ = lifelong.colour


def test_the_reference_page_documents_them() -> None:
    documented = re.findall(r"^::: qtuning_fast\.(?:lifelong\.)?(\w+)$", REFERENCE.read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(lifelong.__all__)


def test_reading_data_does_not_load_the_trainer() -> None:
    code = "import sys, qtuning_fast.lifelong as l; l.load_task; print('qtuning_fast.lifelong.trainer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
