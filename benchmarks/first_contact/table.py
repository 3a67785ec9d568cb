"""The table printed last: what machine, what was right, what took how long, what died and of what."""

from __future__ import annotations

import math
from typing import Any

Line = dict[str, Any]
MOST = 118  # lines: what comes back on the screen is short


def table(lines: list[Line]) -> str:
    """Returns the table of all records, checks first, then times, then what failed."""
    rows = [*_machine(lines), *_checks(lines), *_times(lines), *_tests(lines), *_others(lines), *_failures(lines)]
    if len(rows) > MOST:
        rows[MOST - 1 :] = [f"... {len(rows) - MOST + 1} lines more in first_contact.txt's records"]
    return "\n".join(row[:230] for row in rows) + "\n"


def _of(lines: list[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _machine(lines: list[Line]) -> list[str]:
    rows = []
    for line in _of(lines, "probe"):
        facts = {name: x for name, x in line.items() if name not in ("kind", "step", "at", "what")}
        rows.append(f"{line['what']}: " + ", ".join(f"{name} {_short(x)}" for name, x in facts.items()))
    return rows


def _short(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.4g}"
    return " ".join(f"{name}={each}" for name, each in x.items()) if isinstance(x, dict) else str(x)


def _checks(lines: list[Line]) -> list[str]:
    rows = [f"{line['what']:76} {line['report']}" for line in _of(lines, "compiled ahead")]
    for line in _of(lines, "check"):
        # NaN is the worst error.
        share = {name: error / bar if error == error else math.inf for name, (error, bar) in line["errors"].items()}
        name = max(share, key=lambda name: share[name])
        error, bar = line["errors"][name]
        verdict = f"WRONG: {', '.join(line['wrong'])}" if line["wrong"] else "right"
        bits = "" if line["same_bits"] else ", BITS DIFFER between runs"
        rows.append(f"{line['what']:76} {verdict}{bits}; worst {name} {error:.2g} (bar {bar:g}), {line['seconds']} s")
    return rows


def _times(lines: list[Line]) -> list[str]:
    """One row per case and form: milliseconds, multiples of the floor; forward, then with gradients."""
    times = {(line["what"], line["form"], line.get("note", "")): line for line in _of(lines, "time")}
    rows = [f"{'':92} {'ms':>9} {'x floor':>8} {'ms':>9} {'x floor':>8}"] if times else []
    for (what, form, note), line in times.items():
        cells = []
        for part in ("forward", "both"):
            seconds, floor = line.get(part), (line.get("floor") or {}).get(part)
            cells.append(
                "        -        -"
                if seconds is None
                else f"{1e3 * seconds:9.3f} {seconds / floor if floor else 0:8.2f}"
            )
        wrong = "  WRONG" if _is_wrong(lines, line) else ""
        rows.append(f"{f'{what} {form} {note}'.strip():92} {cells[0]} {cells[1]}{wrong}")
    return rows


def _is_wrong(lines: list[Line], time: Line) -> bool:
    kernel = time.get("operation"), time.get("variant")
    return any(line["wrong"] and (line["operation"], line["variant"]) == kernel for line in _of(lines, "check"))


def _tests(lines: list[Line]) -> list[str]:
    rows = []
    for line in _of(lines, "tests"):
        rows += [f"tests on the device: {line['summary']}", *(f"    FAILED {name}" for name in line["failed"])]
    return rows


def _others(lines: list[Line]) -> list[str]:
    rows = []
    for line in lines:
        if line["kind"] == "peer":
            times = ", ".join(f"{part} {1e3 * line[part]:.3f} ms" for part in ("forward", "both") if line.get(part))
            rows.append(f"peer {line['what']} ({line.get('version', '')}): {times}")
        if line["kind"] == "pretraining":
            rate = f"{line['tokens_per_second']:,.0f} tokens/s, MFU {line.get('mfu', 0):.1%}"
            rows.append(f"{line['name']}: {rate}, {line['seconds']}")
    return rows


def _failures(lines: list[Line]) -> list[str]:
    rows = [
        f"FAILED {line['step']} | {line['what']} {line.get('form', '')}: {line['error']}"
        for line in _of(lines, "failed")
    ]
    last: dict[str, str] = {}
    for line in lines:
        if line["kind"] == "started":
            last[line["step"]] = line["what"]
        if line["kind"] == "ended" and line["code"] != 0:
            how = line.get("signal") or f"exit code {line['code']}"
            tail = " ".join(line.get("tail", "").split())[-150:]
            launch = last.get(line["step"], "none")
            rows.append(f"ENDED {line['step']}: {how} {line.get('why', '')}; last launch: {launch}; {tail}")
    return rows
