"""Results as text, at most 120 columns wide."""

import textwrap
from collections.abc import Mapping
from typing import Any

from qtuning_fast.bench.figures import Row, auto, best, median, ratio, slowdowns
from qtuning_fast.bench.peers import OURS, PEERS

WIDTH = 120
UNGATED = "sdpa"
NO_ROOFLINE = (0.0, "unknown")  # where the ceilings could not be measured


def attention(entry: Mapping[str, Any]) -> str:
    """Peers on one shape: times, the roofline's share of them, errors beside float64; at the end those that failed."""
    shape, rows = entry["shape"], entry["rows"]
    floor_ms = entry.get("floor_ms", {})
    floors = [f"{name} {ms:.4f} ms ({limit})" for name, (ms, limit) in floor_ms.items()] or ["unknown"]
    whole = "step" if shape["trained"] else "forward"
    lines = [
        f"{shape['name']}: {entry['title']}, {entry['dtype']}; {shape['of']}".rstrip("; "),
        f"  roofline: {', '.join(floors)}",
        f"  {'':<24}{'forward':>10}{'backward':>10}{whole:>10}{'±iqr':>9}{'×ours':>7}{'roof':>7}{'eager':>10}"
        f"{'peak MB':>9}{'err out':>9}{'grad':>9}",
    ]
    ours = auto(entry, whole)
    for name, row in rows.items():
        if best(row, "forward") is not None:
            lines.append(_line(name, row, floor_ms.get(whole, NO_ROOFLINE)[0], whole, rows[ours] if ours else None))
    lines.extend(_standing(rows, whole, floor_ms.get(whole, NO_ROOFLINE)[0]))
    lines.extend(predictions(entry))
    lines.extend(_trained(rows) if shape["trained"] else [])
    failed = [f"  {name}: {row['error']}"[:WIDTH] for name, row in rows.items() if row["error"]]
    return "\n".join([*lines, *failed])


def _line(name: str, row: Row, least: float, whole: str, ours: Row | None) -> str:
    ms, spread = median(row, whole), best(row, whole)
    eager = row[whole]["eager"] if row[whole]["graph"] else None  # on a CPU it is the figure itself
    gradients = [error for key, error in row["errors"].items() if key != "output"]
    cells = [
        number(median(row, "forward"), 10, 4),
        number(median(row, "backward"), 10, 4),
        number(ms, 10, 4),
        number(spread["spread"] if spread else None, 9, 4),
        number(ratio(row, ours, whole), 7, 2),
        f"{least / ms:>7.0%}" if ms and least else f"{'-':>7}",
        number(eager["median"] if eager else None, 10, 3),
        number(None if row["peak"] is None else row["peak"] / 2**20, 9, 1),
        *(f"{error:>9.0e}" for error in (row["errors"]["output"], max(gradients, default=0.0))),
    ]
    return f"  {name:<24}{''.join(cells)}"


def predictions(entry: Mapping[str, Any]) -> list[str]:
    """Predictions for ours beside what was measured; empty: nothing was predicted."""
    lines = []
    for name, by_pass in entry.get("predicted_ms", {}).items():
        measured = {which: median(entry["rows"][name], which) for which in by_pass if name in entry["rows"]}
        said = [
            f"{which} {by_pass[which]:.4f} ms, measured {ms:.4f} ({ms / by_pass[which] - 1:+.0%})"
            for which, ms in measured.items()
            if ms
        ]
        if said:
            lines.append(f"  predicted of {name}: {'; '.join(said)}")
    return lines


def _trained(rows: Mapping[str, Row]) -> list[str]:
    """What each peer trains, because times of rows that train different things do not compare."""
    by_what: dict[str, list[str]] = {}
    for name in rows:
        if name in PEERS:
            by_what.setdefault(PEERS[name].trains, []).append(name)
    return [
        line
        for what, names in by_what.items()
        for line in textwrap.wrap(
            f"trained are {what}: {', '.join(names)}", WIDTH, initial_indent="  ", subsequent_indent="    "
        )
    ]


def _standing(rows: Mapping[str, Row], whole: str, least: float) -> list[str]:
    """Ours compared with eager and with the lower bound, and the cost of gate and reweighting."""
    lines = []
    for name in OURS:
        ours = rows.get(name)
        if ours is None or median(ours, whole) is None:
            continue
        said = []
        if speedup := ratio(rows.get("eager"), ours, whole):
            said.append(f"{speedup:.2f} times as fast as eager")
        if slowdown := ratio(ours, rows.get(UNGATED), whole):
            said.append(f"{slowdown:.2f} times the time of {UNGATED}, without a gate")
        if cost := ratio(ours, rows.get(f"{name}-plain"), whole):
            both = [least / ms if (ms := median(rows[n], whole)) else 0.0 for n in (name, f"{name}-plain")]
            beside = f", the roofline {both[0]:.0%} of it and {both[1]:.0%} without" if least else ""
            said.append(f"gate and reweighting {cost - 1:+.1%}{beside}")
        lines += [f"  {name}: {'; '.join(said)}"] if said else []
    return lines


def headline(entry: Mapping[str, Any]) -> list[str]:
    """A shape, and how ours compares there."""
    whole = "step" if entry["shape"]["trained"] else "forward"
    least = entry.get("floor_ms", {}).get(whole, NO_ROOFLINE)[0]
    standing = [line.strip() for line in _standing(entry["rows"], whole, least)]
    return [f"  {entry['shape']['name']}: {'; '.join(standing) or 'ours was not measured'}"[:WIDTH]]


def ingredients(entry: Mapping[str, Any]) -> str:
    """What each ingredient costs: the time with all of them, less the time without one."""
    rows, whole = entry["rows"], "step"
    everything = median(rows["all"], whole)
    lines = [f"{entry['name']}: {entry['title']}, {entry['dtype']}, {entry['peer']}"]
    lines.append(f"  {'':<24}{whole + ' ms':>12}{'±iqr':>10}{'it costs':>12}{'':>10}")
    for name, row in rows.items():
        ms, timing = median(row, whole), best(row, whole)
        if ms is None or timing is None or everything is None:
            lines.append(f"  {name:<24}{row['error']}"[:WIDTH])
            continue
        cost = "" if name == "all" else f"{everything - ms:>+9.4f} ms{(everything - ms) / ms:>+10.1%}"
        lines.append(f"  {name:<24}{ms:>12.4f}{timing['spread']:>10.4f}{cost}")
    return "\n".join(lines)


def growth(entry: Mapping[str, Any]) -> str:
    """One line a peer, one column a size."""
    points = entry["points"]
    lines = [f"growth with {entry['of']}: {entry['title']}; {entry['pass']}, ms"]
    lines.append(f"  {entry['of']:<18}" + "".join(f"{size:>10}" for size in points))
    for peer in entry["peers"]:
        cells = [number(median(rows[peer], entry["pass"]), 10, 3) for rows in points.values()]
        lines.append(f"  {peer:<18}{''.join(cells)}"[:WIDTH])
    return "\n".join(lines)


def drop_in(entry: Mapping[str, Any]) -> str:
    """One line a case: forward, step and its ratio to the case that the others are compared with."""
    rows = entry["rows"]
    lines = [entry["about"], f"  {'':<28}{'forward':>10}{'step':>10}{'ratio':>8}  (ms; over {entry['over']})"]
    for name, row in rows.items():
        if row["error"]:
            lines.append(f"  {name}: {row['error']}"[:WIDTH])
        else:
            over = ratio(row, rows[entry["over"]], "step")
            cells = [number(median(row, which), 10, 3) for which in ("forward", "step")]
            lines.append(f"  {name:<28}{''.join(cells)}{number(over, 8, 2)}")
    return "\n".join(lines)


def busy(entry: Mapping[str, Any]) -> str:
    """One line a peer: a step alone, and how much slower it is beside busy processes."""
    lines = [
        f"{entry['about']}; {entry['of']}",
        f"  {'':<20}{'alone, ms':>10}"
        + "".join(f"{f'beside {count}':>12}" for count in entry["beside"] if count != "0"),
    ]
    for peer, row in entry["beside"]["0"].items():
        if row["error"]:
            lines.append(f"  {peer}: {row['error']}"[:WIDTH])
            continue
        found = slowdowns(entry, peer)
        cells = [f"{f'{found[count]:.2f} x':>12}" for count in sorted(found) if count]
        lines.append(f"  {peer:<20}{number(median(row, 'step'), 10, 2)}{''.join(cells)}")
    return "\n".join(lines)


def number(x: float | None, width: int, digits: int) -> str:
    return f"{'-' if x is None else f'{x:.{digits}f}':>{width}}"
