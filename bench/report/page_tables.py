"""The tables of docs/performance.md as lines of Markdown."""

from collections.abc import Mapping
from typing import Any

from qtuning_fast.bench import figures
from qtuning_fast.bench.rows.tables import predictions

Document = Mapping[str, Any]


def attention(document: Document) -> list[str]:
    """Milliseconds of our step, and the times of others over it."""
    lines = ["| | ours | roofline | eager | sdpa | attention alone | memory: ours, eager, sdpa | again |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for entry in document["entries"].values():
        rows, ours = entry["rows"], figures.auto(entry, "step")
        if ours is None:
            continue
        ms = figures.median(rows[ours], "step")
        cells = [f"{ms:.3g} ms ({ours})", _roofline(entry, "step", ms)]
        cells += [_times(figures.ratio(rows.get(peer), rows[ours], "step")) for peer in ("eager", "sdpa")]
        cells.append(_times(attention_alone(rows, rows[ours])))
        cells.append(", ".join(_mebibytes(rows.get(peer)) for peer in (ours, "eager", "sdpa")))
        cells.append(_times(figures.ratio(rows.get(f"{ours}-again"), rows[ours], "step")))
        lines.append(f"| {entry['shape']['of']}: {entry['title']} | {' | '.join(cells)} |")
    return [*lines, "", *_predicted(document), *_cannot(document)]


def attention_alone(rows: Mapping[str, Any], ours: Mapping[str, Any]) -> float | None:
    """The lower bound, over ours: the fastest attention without a gate that has the prefix in place already."""
    found = [figures.ratio(row, ours, "step") for name, row in rows.items() if name.endswith("-no-concat")]
    return min((x for x in found if x), default=None)


def _predicted(document: Document) -> list[str]:
    """Predictions for ours beside what was measured, if there are any."""
    entries = document["entries"].items()
    lines = [f"- {name},{line.removeprefix('  predicted of')}" for name, e in entries for line in predictions(e)]
    return ["Predicted before it was measured:", "", *lines, ""] if lines else []


def _cannot(document: Document) -> list[str]:
    """Peers that failed on some shape, and their errors."""
    said: dict[str, set[str]] = {}
    for entry in document["entries"].values():
        for peer, row in entry["rows"].items():
            if row["error"] and figures.best(row, "step") is None:
                said.setdefault(row["error"], set()).add(peer)
    lines = [f"- {', '.join(sorted(peers))}: `{error}`" for error, peers in said.items()]
    return ["Peers that cannot train on some shape, and their errors:", "", *lines] if lines else []


def decode(document: Document) -> list[str]:
    lines = ["| | ours | roofline | sdpa, prefix in the cache | eager |", "|---|---|---|---|---|"]
    for entry in document["entries"].values():
        rows, ours = entry["rows"], figures.auto(entry, "forward")
        if ours is None:
            continue
        ms = figures.median(rows[ours], "forward")
        cells = [f"{ms:.3g} ms ({ours})", _roofline(entry, "forward", ms)]
        cells += [_times(figures.ratio(rows.get(p), rows[ours], "forward")) for p in ("sdpa-no-concat", "eager")]
        lines.append(f"| {entry['title']} | {' | '.join(cells)} |")
    return lines


def drop_in(document: Document) -> list[str]:
    """Milliseconds of a step of each case, and the ratio to the one that it is compared with."""
    lines = ["| | ms | ratio |", "|---|---|---|"]
    for entry in document["entries"].values():
        over = entry["rows"][entry["over"]]
        for name, row in entry["rows"].items():
            ms = figures.median(row, "step")
            if ms is not None:
                shown = "" if name == entry["over"] else _times(figures.ratio(row, over, "step"))
                lines.append(f"| {name}: {entry['shapes'][name]} | {ms:.3g} | {shown} |")
    return lines


def busy(document: Document) -> list[str]:
    """Milliseconds of a step alone, and how many times as long it takes beside busy processes."""
    lines = ["| | alone | beside one | beside two |", "|---|---|---|---|"]
    for entry in document["entries"].values():
        for peer, row in entry["beside"]["0"].items():
            ms, found = figures.median(row, "step"), figures.slowdowns(entry, peer)
            if ms is not None:
                beside = " | ".join(_times(found.get(count)) for count in (1, 2))
                lines.append(f"| {peer}, {entry['about']} | {ms:.3g} ms | {beside} |")
    return lines


def tests(document: Document) -> list[str]:
    lines = ["| | passed | failed | skipped |", "|---|---|---|---|"]
    for name, entry in document["entries"].items():
        lines.append(f"| {name} | {' | '.join(str(entry.get(x, 0)) for x in ('passed', 'failed', 'skipped'))} |")
    failures = {test: why for entry in document["entries"].values() for test, why in entry["failures"].items()}
    return [*lines, "", *(f"- `{test}`: `{why}`" for test, why in failures.items())]


def ingredients(document: Document) -> list[str]:
    lines = [
        "| | " + " | ".join(("gate", "reweighting", "bank", "padding", "all of them")) + " |",
        "|---|---|---|---|---|---|",
    ]
    for entry in document["entries"].values():
        rows, everything = entry["rows"], figures.median(entry["rows"]["all"], "step")
        cells = []
        for name in ("gate", "reweighting", "bank", "padding", "any"):
            ms = figures.median(rows[f"without {name}"], "step")
            cells.append(f"{(everything - ms) / ms:+.1%}" if ms and everything else "")
        lines.append(f"| {entry['peer']}, {entry['title']} | {' | '.join(cells)} |")
    return lines


def lifelong(document: Document) -> list[str]:
    lines = ["| last ten tasks over tasks 6 to 15 | step | step over the anchor | anchor | memory | adapter |"]
    lines.append("|---|---|---|---|---|---|")
    names = ("step_ms", "step_over_anchor", "anchor_ms", "resident_bytes", "adapter_bytes")
    for method, entry in document["entries"].items():
        ratios = (entry["verdict"] or {"ratios": {}})["ratios"]
        cells = [f"{ratios[name]:.3f}" if name in ratios else "" for name in names]
        lines.append(f"| {method}: {entry['about']} | {' | '.join(cells)} |")
    return lines


def models(document: Document) -> list[str]:
    lines = ["| | tokens a second | memory beyond the weights | trained |", "|---|---|---|---|"]
    failed: dict[str, list[str]] = {}  # what could not train, by its error
    for name, entry in document["entries"].items():
        for way, row in entry["rows"].items():
            if row["timing"] is None:
                failed.setdefault(row["error"], []).append(f"{name}: {way}")
                continue
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
            lines.append(
                f"| {name}: {way} | {row['tokens_per_second']:,.0f} | {peak} | {row['trainable_parameters']:,} |"
            )
    if failed:
        lines += ["", *(f"- {', '.join(ways)}: `{error}`" for error, ways in failed.items())]
    return lines


def mixed(document: Document) -> list[str]:
    rows = document["entries"]["forward"]["rows"]
    base = rows["one-task"]["eager"]["median"]
    lines = ["| | ms | over one task |", "|---|---|---|"]
    for name, row in rows.items():
        timing = row["eager"]
        lines.append(f"| {name} | {timing['median']:.1f} ± {timing['spread']:.1f} | {timing['median'] / base:.2f} |")
    return lines


def task_inference(document: Document) -> list[str]:
    """What fitting, scoring and recording cost, predictions in brackets."""
    lines = ["| | fitting once | memory while fitting | statistics | rule | scoring | over a pass | recording |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for entry in document["entries"].values():
        name, passes = f"{entry['of']}, F = {entry['sizes']['hidden']}", entry["passes_to_record"]
        for tasks, row in entry["rows"].items():
            said, ms = row["predicted"], {which: timing["median"] for which, timing in row["ms"].items()}
            peak = row["fit_peak_bytes"]
            cells = [
                f"{row['fit_seconds']['median']:.2f} s ({said['fit_seconds']:.2f} s)",
                "" if peak is None else f"{peak / 2**20:.0f} MiB",
                *(f"{row[which] / 2**20:.1f} MiB" for which in ("statistics_bytes", "rule_bytes")),
                f"{ms['score']:.1f} ms ({said['score_ms']:.1f} ms)",
                f"{ms['score'] / ms['forward']:.2g}",
                f"{ms['record']:.1f} ms beside {passes * ms['forward'] / 1e3:.1f} s of passes",
            ]
            lines.append(f"| {name}: {int(tasks):,} tasks | {' | '.join(cells)} |")
    return lines


def _roofline(entry: Mapping[str, Any], which: str, ms: float) -> str:
    return f"{entry['floor_ms'][which][0] / ms:.0%}" if "floor_ms" in entry else ""


def _times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f} ×"


def _mebibytes(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None or row["peak"] is None else f"{row['peak'] / 2**20:.0f}" + " MiB"
