"""Gathers what the steps of a plan write into one file, and unpacks that file to where its parts belong.

The file is rewritten whenever a step has written, in one operation, so that a run that is killed loses nothing.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtuning_fast.bench.plans.schedule import NO_TIME
from qtuning_fast.bench.results import ROOT, TABLES, device_folder, provenance, write_json
from qtuning_fast.bench.rows import tables

NOT_BEGUN = "not begun"
MEASURED_BY = {"blocks.json": "tuning", "backend_order.json": "choose"}  # which step writes a table
Document = dict[str, Any]


@dataclass
class Outcome:
    """The status of a step."""

    name: str
    status: str = NOT_BEGUN
    seconds: float = 0.0
    processes: int = 0  # more than one where it died and went on


class Archive:
    """The file of one run.

    Args:
        plan: its name.
        folder: where the steps write; files of an earlier run are deleted.
        out: the file.
        outcomes: the statuses of the steps, which change while they run.
    """

    def __init__(self, plan: str, folder: Path, out: Path, outcomes: Sequence[Outcome], *, dry_run: bool) -> None:
        self.folder, self.out, self.outcomes = folder, out, outcomes
        self._tables: Document = {}
        self._documents: Document = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        self._written = ""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.json"):
            old.unlink()
        self._header = {"plan": plan, "dry_run": dry_run} | provenance(device())

    def write(self) -> None:
        """Writes what the steps have found so far, if anything is new."""
        for path in sorted(self.folder.glob("*.json")):
            self._documents[path.stem] = self._read(path, self._documents.get(path.stem))
        for name, table in TABLES.items():
            self._tables[name] = self._read(ROOT / table, self._tables.get(name))
        known = {name: table for name, table in self._tables.items() if table is not None}
        found = {"steps": [asdict(o) for o in self.outcomes], "documents": self._documents, "tables": known}
        if (now := json.dumps(found)) != self._written:
            write_json(self.out, self._header | found)
            self._written = now

    def units(self, step: str) -> Document:
        """The log of a step's units (`schedule.py`); empty: it has none."""
        return (self._documents.get(step) or {}).get("units", {})

    def verdict(self, step: str) -> str | None:
        """What a step has found to be wrong (`smoke.py`); empty: nothing, None: it is not known yet."""
        found: str | None = (self._documents.get(step) or {}).get("entries", {}).get("verdict", {}).get("wrong")
        return found

    def _read(self, path: Path, known: Any) -> Any:
        """The content of a file; the known content if it has not changed or is being written."""
        with suppress(FileNotFoundError, json.JSONDecodeError):
            stamp = path.stat().st_mtime_ns, path.stat().st_size
            if self._seen.get(path) != stamp:
                known = json.loads(path.read_text())
                self._seen[path] = stamp
        return known


def device() -> Mapping[str, Any] | str:
    """The GPU as its driver names it, without a CUDA context in this process; "cpu" if there is none."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        name, mebibytes = said.splitlines()[0].rsplit(",", 1)
        return {"type": "cuda", "name": name.strip(), "GiB": round(int(mebibytes) / 1024, 1)}
    return "cpu"


def summary(document: Document) -> str:
    """The steps and their most important figures, at most 120 columns wide."""
    lines = [f"\n=== {document['plan']}, {document['device']['name']}, {document['date']} ==="]
    lines += [f"  {step['name']:<16}{step['seconds']:>8.1f} s  {step['status']}" for step in document["steps"]]
    for name, found in document["documents"].items():
        entries = (found or {}).get("entries", {})
        for entry in entries.values():
            if "shape" in entry and "rows" in entry:
                lines.extend(tables.headline(entry))
            elif "summary" in entry:
                lines.append(f"  {name}: {entry['summary']}"[: tables.WIDTH])
    return "\n".join(lines)


def unpack(source: Path) -> list[Path]:
    """Writes documents into the device's folder of results, and measured tables to where they are read.

    What a step named "attention-…" adds goes into the file of "attention". Returns the paths that were written.
    """
    document = json.loads(source.read_text())
    results = ROOT / "bench/results" / device_folder(document["device"])
    if document["dry_run"]:
        raise SystemExit(f"{source} is of a dry run, which measures nothing")
    written = []
    for name, content in sorted(document["documents"].items()):  # a question before what adds to it
        if content is None:  # it was being written at the last moment
            continue
        path = results / f"{name.partition('-')[0]}.json"
        results.mkdir(parents=True, exist_ok=True)
        if "-" in name and path.exists():
            content = merged(json.loads(path.read_text()), content)
        path.write_text(json.dumps(content, indent=1) + "\n")
        written.append(path)
    begun = {step["name"] for step in document["steps"] if step["status"] not in (NOT_BEGUN, NO_TIME)}
    for name, content in document["tables"].items():
        if MEASURED_BY[name] not in begun:  # it is the one that the run found
            continue
        written.append(ROOT / TABLES[name])
        rows = ",\n  ".join(json.dumps(row) for row in content)
        written[-1].write_text(f"[\n  {rows}\n]\n")
    return list(dict.fromkeys(written))


def merged(known: Document, added: Document) -> Document:
    """A document with the entries of another one of the same question, and with its rows in entries of both."""
    entries = dict(known["entries"])
    for name, entry in added["entries"].items():
        rows = entries.get(name, {}).get("rows", {}) | {
            n: r
            for n, r in entry.get("rows", {}).items()
            if not _is_worse(r, known["entries"].get(name, {}).get("rows", {}).get(n))
        }
        entries[name] = entries.get(name, entry) | ({"rows": rows} if rows else {})
    return known | {"entries": entries, "units": known.get("units", {}) | added.get("units", {})}


def _is_worse(row: Document, known: Document | None) -> bool:
    """Whether a row was left out, or was timed alone while the known one took turns."""
    return row.get("error", "") == NO_TIME or bool(known and known.get("turns") and not row.get("turns"))
