"""A file of results says where its figures come from, and whether the code has changed since."""

import json
import subprocess

import pytest

from qtuning_fast.bench import results
from qtuning_fast.bench.results import Results, changed_since


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    sources = {"kernels": tmp_path / "kernels", "backends": tmp_path / "qtuning_fast/attention"}
    assert sources.keys() == results.SOURCES.keys() and all(path.is_dir() for path in results.SOURCES.values())
    for folder in sources.values():
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("x = 1\n")
    (tmp_path / "setup.py").write_text("")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "SOURCES", sources)
    return tmp_path


def test_the_file_grows_as_results_come(tmp_path):
    out = tmp_path / "new" / "growth.json"
    written = Results("growth", out, "cpu", "python -m qtuning_fast.bench.rows.growth --with N", rounds=3)
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


def test_an_installed_package_has_no_commit(checkout):
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    (checkout / "setup.py").unlink()
    assert results.provenance("cpu")["commit"] is None


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ({"type": "cpu", "name": "AMD EPYC 9B45"}, "cpu"),
        ({"type": "cuda", "name": "NVIDIA H100 80GB HBM3"}, "h100"),
        ({"type": "cuda", "name": "NVIDIA H200"}, "h200"),
        ({"type": "cuda", "name": "Some Card"}, "some-card"),
    ],
)
def test_a_device_has_a_folder(device, folder):
    assert results.device_folder(device) == folder
