"""What several processes of pytest found is one result, and known before they have ended."""

import json
from pathlib import Path

import pytest

from qtuning_fast.bench import gpu_tests

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
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
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
    assert found == {"failures": {"process 0": "exit status 4"}}


@pytest.mark.parametrize("failures", [{}, {"a test": "why"}])
def test_a_run_writes_what_it_hears(tmp_path, monkeypatch, capsys, failures):
    def run(shards, folder, heard):
        heard({"passed": 3, "failures": dict(failures)})
        return {"passed": 3, "failures": dict(failures)}

    monkeypatch.setattr(gpu_tests, "run", run)
    out = tmp_path / "tests.json"
    assert gpu_tests.main(["--dry-run", "--out", str(out)]) == bool(failures)
    entries = json.loads(out.read_text())["entries"]
    assert entries.keys() == {"alone", "side by side"} and entries["alone"]["failures"] == failures
    assert "side by side" in capsys.readouterr().out


def test_no_test_for_a_gpu_is_left_out():
    root, known = Path(__file__).parents[2], [*gpu_tests.ALONE, *gpu_tests.SIDE_BY_SIDE]
    assert all((root / path).exists() for path in known)
    marked = [path for path in (root / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    marked.remove(Path(__file__))  # in a string
    assert marked and all(any(path.is_relative_to(root / each) for each in known) for path in marked)
