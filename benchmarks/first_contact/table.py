"""The table printed last: what machine, what was right, what took how long, what died and of what."""

import math

MOST = 118  # lines: what comes back on the screen is short
HIDDEN = ("kind", "step", "at", "what")


def table(lines: list[dict]) -> str:
    """Returns the table of all records, checks first, then times, then what failed."""
    of = {kind: [line for line in lines if line["kind"] == kind] for kind in {line["kind"] for line in lines}}
    rows = [
        f"{line['what']}: " + ", ".join(f"{name} {_short(x)}" for name, x in line.items() if name not in HIDDEN)
        for line in of.get("probe", ())
    ]
    rows += [f"{line['what']:76} {line['report']}" for line in of.get("compiled ahead", ())]
    rows += [_check(line) for line in of.get("check", ())]
    rows += _times(of.get("time", []), of.get("check", []))
    for line in of.get("tests", ()):
        rows += [f"tests on the device: {line['summary']}", *(f"    FAILED {name}" for name in line["failed"])]
    for line in of.get("peer", ()):
        times = ", ".join(f"{part} {1e3 * line[part]:.3f} ms" for part in ("forward", "both") if line.get(part))
        rows.append(f"peer {line['what']} ({line.get('version', '')}): {times}")
    for line in of.get("pretraining", ()):
        rate = f"{line['tokens_per_second']:,.0f} tokens/s, MFU {line.get('mfu', 0):.1%}"
        rows.append(f"{line['name']}: {rate}, {line['seconds']}")
    rows += [f"FAILED {x['step']} | {x['what']} {x.get('form', '')}: {x['error']}" for x in of.get("failed", ())]
    rows += _ends(lines)
    if len(rows) > MOST:
        rows[MOST - 1 :] = [f"... {len(rows) - MOST + 1} lines more in first_contact.txt's records"]
    return "\n".join(row[:230] for row in rows) + "\n"


def _short(x) -> str:
    if isinstance(x, float):
        return f"{x:.4g}"
    return " ".join(f"{name}={each}" for name, each in x.items()) if isinstance(x, dict) else str(x)


def _check(line: dict) -> str:
    # NaN is the worst error.
    share = {name: error / bar if error == error else math.inf for name, (error, bar) in line["errors"].items()}
    name = max(share, key=share.__getitem__)
    error, bar = line["errors"][name]
    verdict = f"WRONG: {', '.join(line['wrong'])}" if line["wrong"] else "right"
    bits = "" if line["same_bits"] else ", BITS DIFFER between runs"
    return f"{line['what']:76} {verdict}{bits}; worst {name} {error:.2g} (bar {bar:g}), {line['seconds']} s"


def _times(times: list[dict], checks: list[dict]) -> list[str]:
    """Returns one row per case and form: milliseconds, multiples of the floor; forward, then with gradients."""
    last = {(line["what"], line["form"], line.get("note", "")): line for line in times}
    wrong = {(line["operation"], line["variant"]) for line in checks if line["wrong"]}
    rows = [f"{'':92} {'ms':>9} {'x floor':>8} {'ms':>9} {'x floor':>8}"] if last else []
    for key, line in last.items():
        cells = " ".join(_time(line.get(part), (line.get("floor") or {}).get(part)) for part in ("forward", "both"))
        mark = "  WRONG" if (line.get("operation"), line.get("variant")) in wrong else ""
        rows.append(f"{' '.join(key).strip():92} {cells}{mark}")
    return rows


def _time(seconds: float | None, floor: float | None) -> str:
    if seconds is None:
        return f"{'-':>9} {'-':>8}"
    return f"{1e3 * seconds:9.3f} {seconds / floor if floor else 0:8.2f}"


def _ends(lines: list[dict]) -> list[str]:
    """Returns a row per child that did not end well, with its last launch."""
    rows, last = [], {}
    for line in lines:
        if line["kind"] == "started":
            last[line["step"]] = line["what"]
        if line["kind"] == "ended" and line["code"] != 0:
            end = f"{line.get('signal') or 'exit code {}'.format(line['code'])} {line.get('why', '')}"
            tail = " ".join(line.get("tail", "").split())[-150:]
            rows.append(f"ENDED {line['step']}: {end}; last launch: {last.get(line['step'], 'none')}; {tail}")
    return rows
