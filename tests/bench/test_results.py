"""A file of results says where its figures come from, and whether the code has changed since."""

import json
import subprocess

import pytest

from qtuning_fast.bench import results
from qtuning_fast.bench.results import Results, changed_since


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for folder in results.SOURCES.values():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    return tmp_path


def test_the_file_grows_as_results_come(tmp_path):
    out = tmp_path / "new" / "growth.json"
    written = Results("growth", out, "cpu", ["--with", "N"], rounds=3)
    assert json.loads(out.read_text())["entries"] == {}
    written.add("N", {"ms": 1.5})
    written.fail("P", "no time left")
    document = json.loads(out.read_text())
    assert document["entries"] == {"N": {"ms": 1.5}} and document["errors"] == {"P": "no time left"}
    assert document["command"] == "python -m qtuning_fast.bench.rows.growth --with N" and document["rounds"] == 3
    assert document["device"]["type"] == "cpu" and document["versions"]["torch"] and document["date"]
    assert document["digests"].keys() == {"kernels", "backends"} and "torch" in written.heading()
    assert list(out.parent.iterdir()) == [out]


def test_what_has_changed_since_is_named(checkout):
    document = {"digests": results.digests()}
    assert changed_since(document) == []
    (checkout / "kernels" / "notes.md").write_text("no code")
    assert changed_since(document) == []
    (checkout / "kernels" / "blocks.json").write_text("[]")
    assert changed_since(document) == ["kernels"]
    (checkout / "qtuning_fast/attention" / "code.py").rename(checkout / "qtuning_fast/attention" / "renamed.py")
    assert changed_since(document) == ["kernels", "backends"]


def test_the_commit_is_known_in_a_checkout_only(checkout):
    assert results.provenance("cpu")["commit"] is None
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], cwd=checkout, check=True)
    found = results.provenance("cpu")
    assert len(found["commit"]) == 12 and not found["modified"]
    (checkout / "kernels" / "code.py").write_text("x = 2\n")
    assert results.provenance("cpu")["modified"]
