"""What several processes of pytest found is one result, and known before they have ended."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtuning_fast.bench.plans import gpu_tests

TESTS = """
import pytest

@pytest.mark.gpu
def test_good():
    pass

@pytest.mark.gpu
@pytest.mark.parametrize("x", [1, 2])
def test_bad(x):
    assert x == 0, "never"

@pytest.mark.gpu
def test_absent():
    pytest.skip("no such device")

@pytest.mark.gpu
def test_not_set_up(missing):
    pass

def test_of_another_kind():
    pass
"""


@pytest.fixture
def tests(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return tmp_path


def test_outcomes_are_counted_and_failures_named_with_their_first_line(tests):
    heard = []
    found = gpu_tests.run([["test_it.py"], ["test_it.py", "-k", "good"]], tests, heard.append)
    failures = found["failures"]
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 3, 1) and heard[-1] == found
    assert failures["test_it.py::test_bad[1]"] == "AssertionError: never"
    assert "fixture 'missing' not found" in failures["test_it.py::test_not_set_up"]
    assert len(heard) > 1 and "failures" in heard[0]


def test_a_process_that_dies_is_a_failure(tests):
    found = gpu_tests.run([["--no-such-option"]], tests, lambda found: None)
    assert found == {"failures": {"process 0": "exit status 4"}, "each": {}}


def test_a_shard_compiles_by_itself(tests):
    """Inductor's own pool in each of fifteen processes would be more of them than there are cores."""
    code = "import os\nimport pytest\n@pytest.mark.gpu\ndef test_it():\n"
    (tests / "test_pool.py").write_text(f"{code}    assert os.environ['TORCHINDUCTOR_COMPILE_THREADS'] == '1'\n")
    assert gpu_tests.run([["test_pool.py"]], tests, lambda found: None)["passed"] == 1


def test_what_is_not_through_at_the_deadline_is_ended_and_what_passed_by_then_counts(tests):
    slow = "import time\nimport pytest\n"
    slow += "".join(f"@pytest.mark.gpu\ndef test_{n}(): time.sleep({n})\n" for n in (0, 60))
    (tests / "test_slow.py").write_text(slow)
    started = time.monotonic()
    found = gpu_tests.run([["test_slow.py"]], tests, lambda found: None, deadline=started + 15)
    assert (found["passed"], found["cut_off"], found["failures"]) == (1, 1, {}) and time.monotonic() - started < 40
    assert list(found["each"]) == ["test_slow.py::test_0"]


def test_what_tells_most_comes_first_and_three_of_float32_begin_at_once():
    pytest_on_gpu = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", gpu_tests.__name__]
    names = subprocess.run(
        [*pytest_on_gpu, *gpu_tests.SIDE_BY_SIDE],
        cwd=gpu_tests.ROOT,
        env=os.environ | {"PYTHONPATH": str(gpu_tests.ROOT), gpu_tests.PART: "telling", gpu_tests.LOG: os.devnull},
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    names = [name for name in names if "::" in name]
    assert len(names) > 200 and sum("[float32-" in name for name in names) == len(gpu_tests.CHOSEN_IEEE) == 3
    assert all("[float32-" in name for name in names[:3])
    first = names[3 : 2 * gpu_tests.SHARDS]  # in the first two rounds of the shards
    for words in (
        "real_shapes[bfloat16-bert-base]",
        "real_shapes[bfloat16-llama-8b]",
        "fused_gpu.py::test_the_same_bits",
    ):
        assert any(words in name for name in first), words
    assert all("graph" not in name for name in names[150:] if "fused_gpu" in name)


@pytest.mark.parametrize("failures", [{}, {"a test": "why"}])
def test_a_run_writes_what_it_hears(tmp_path, monkeypatch, capsys, failures):
    def run(shards, folder, heard, **options):
        heard({"passed": 3, "failures": dict(failures)})
        return {"passed": 3, "failures": dict(failures)}

    monkeypatch.setattr(gpu_tests, "run", run)
    out = tmp_path / "tests.json"
    assert gpu_tests.main(["--dry-run", "--out", str(out)]) == bool(failures)
    entries = json.loads(out.read_text())["entries"]
    assert entries.keys() == {"alone", "side by side"} and entries["alone"]["failures"] == failures
    assert "side by side" in capsys.readouterr().out


def test_no_test_for_a_gpu_is_left_out():
    root, known = Path(__file__).parents[3], [*gpu_tests.ALONE, *gpu_tests.SIDE_BY_SIDE]
    assert all((root / path).exists() for path in known)
    marked = [path for path in (root / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    marked.remove(Path(__file__))  # in a string
    assert marked and all(any(path.is_relative_to(root / each) for each in known) for path in marked)
