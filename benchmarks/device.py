"""Makes results and documents of what a first contact with a GPU brought back: predicted, measured, peer and floor, one
line per case.

    python main.py bench device --from FOLDER [FOLDER ...]          # print the comparison
    python main.py bench device --from FOLDER [FOLDER ...] --out    # also benchmarks/results/DEVICE/first_contact.json and docs/gpu_measured.md

FOLDERs hold first_contact.jsonl, as `python3 -m recollect.benchmarks.first_contact` writes it, from one kind of device;
of a case in several, the last counts, and the kernel's first time is kept beside it as `before`. Nothing here runs on a
device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recollect.benchmarks.first_contact import records
from recollect.benchmarks.first_contact.predictions import PREDICTIONS
from recollect.benchmarks.machine import folder_name
from recollect.benchmarks.reporting import REPOSITORY, Parser
from recollect.configuration import UserError

DOCUMENT = "gpu_measured.md"
PEERS = {  # of kernel_peers.py: the case whose arrays it is given
    "linear_attention": "linear_recurrence, no decay",
    "simple_gla": "linear_recurrence, decay per head",
    "gla": "linear_recurrence, decay per channel",
    "gated_delta_rule": "linear_recurrence, gated delta, decay per head",
    "kda": "linear_recurrence, gated delta, decay per channel",
    "causal_attention": "softmax_attention, causal",
    "sliding_attention": "softmax_attention, window",
    "based": "taylor_attention, normalised",
    "short_conv": "short_convolution, 4 taps, silu, gate",
}
NEEDED = {  # of a line of each kind
    "probe": ("what",),
    "check": ("what", "wrong", "same_bits"),
    "time": ("what", "form", "sizes"),
    "peer": ("what",),
    "pretraining": ("what", "tokens_per_second", "step_seconds", "rows", "length", "waiting_for_data"),
    "tests": ("summary",),
}
LIBRARIES = ("cudnn", "jla", "lax.conv", "jnp.fft", "all heads, cudnn")


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; 1 if a kernel was wrong.

    Raises:
      UserError: a folder without records, or records of two kinds of device.
    """
    parser = Parser("device", __doc__)
    parser.add_argument(
        "--from", dest="folders", nargs="+", type=Path, required=True, metavar="FOLDER", help="with first_contact.jsonl"
    )
    parser.add_out("first_contact.json, and docs/gpu_measured.md beside the README")
    options = parser.parse_args(arguments)
    result = gathered(options.folders)
    text = document(result)
    print(text)
    if options.out is not None:
        path = Path(options.out) / folder_name(result["device"]) / "first_contact.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        page = REPOSITORY / "docs" / DOCUMENT
        page.write_text(text)
        print(f"written: {path}, {page}")
    return 1 if any(check["wrong"] for check in result["checks"]) else 0


def gathered(folders: list[Path]) -> dict[str, Any]:
    """Returns what the folders' records say, by kind.

    Raises:
      UserError: a folder without records, or records of two kinds of device.
    """
    checks: dict[str, Any] = {}
    times: dict[tuple[str, ...], dict[str, Any]] = {}
    found: dict[str, Any] = {"tests": [], "peers": {}, "pretraining": {}, "failed": [], "contacts": []}
    devices = []
    for folder in folders:
        lines = records.read(folder / records.FILE) if (folder / records.FILE).is_file() else []
        if not lines:
            raise UserError(f"bench device: {folder} has no {records.FILE}, or one without a record")
        for line in lines:
            lacking = [name for name in _needed(line) if name not in line]
            if lacking:
                raise UserError(
                    f"bench device: {folder / records.FILE}: a line of kind {line['kind']!r} lacks {', '.join(lacking)}"
                )
        devices += [line["device"] for line in lines if line["kind"] == "probe" and line["what"] == "machine"]
        begun = next((line for line in lines if line["kind"] == "begun"), {})
        probes = {line["what"]: _facts(line) for line in lines if line["kind"] == "probe"}
        found["contacts"].append({"date": begun.get("date"), "command": begun.get("command"), **probes})
        checks |= {line["what"]: _facts(line) for line in lines if line["kind"] == "check"}
        for line in lines:
            if line["kind"] == "time":
                key = (line["what"], line["form"], line.get("note", ""))
                earlier = times.get(key, {})
                before = earlier.get("before") or {
                    part: earlier[part] for part in ("forward", "both") if part in earlier
                }
                same_contact = earlier.get("contact") == len(devices)
                times[key] = {**_facts(line), "contact": len(devices)}
                if before and not (same_contact and "before" not in earlier):
                    times[key]["before"] = before
            if line["kind"] in ("peer", "pretraining"):
                found["peers" if line["kind"] == "peer" else "pretraining"][line["what"]] = _facts(line)
            if line["kind"] == "tests":
                found["tests"].append(_facts(line))
            if line["kind"] == "failed":
                found["failed"].append(_facts(line))
    if len(set(devices)) != 1:
        raise UserError(
            f"bench device: the folders are of {', '.join(sorted(set(devices))) or 'no device'}; one kind is needed"
        )
    return {"device": devices[0], **found, "checks": list(checks.values()), "times": list(times.values())}


def _needed(line: dict[str, Any]) -> tuple[str, ...]:
    machine = ("device", "versions") if (line["kind"], line.get("what")) == ("probe", "machine") else ()
    return NEEDED.get(line["kind"], ()) + machine


def _facts(line: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in line.items() if name not in ("kind", "step", "at")}


def document(result: dict[str, Any]) -> str:
    """Returns the page: machine, checks, times beside peers and floors, pretraining, predictions answered."""
    first = next(contact for contact in result["contacts"] if "machine" in contact)
    versions = first["machine"]["versions"]
    dates = ", ".join(dict.fromkeys(str(contact["date"]) for contact in result["contacts"]))
    rates = first.get("ceilings", {})
    wrong = [check for check in result["checks"] if check["wrong"]]
    lines = [
        f"# Measured on one {result['device']}",
        "",
        f"Made by `python main.py bench device` from what `python3 -m recollect.benchmarks.first_contact` brought back on {dates}. jax {versions.get('jax')},",
        f"cuDNN {versions.get('nvidia-cudnn-cu13', 'not here')}, torch {versions.get('torch', 'not here')}. A large copy moves "
        f"{rates.get('copy_bytes_per_second', 0) / 1e12:.2f} TB/s (read and written), an 8,192^3",
        f"product in bf16 runs at {rates.get('product_flops_per_second', 0) / 1e12:.0f} TFLOP/s. Everything is bf16; times are medians of 10 turns.",
        "",
        "## Checks",
        "",
        f"{len(result['checks'])} comparisons with float64, outputs and gradients, odd lengths, documents, and rows at full size: "
        f"{len(result['checks']) - len(wrong)} within their bars. "
        f"{sum(check['same_bits'] for check in result['checks'])} gave the same bits twice.",
        *(f"- WRONG: {check['what']}: {', '.join(check['wrong'])}" for check in wrong),
        *(
            f"\nThe tests that are simulated elsewhere, run on the device: {tests['summary']}."
            for tests in result["tests"]
        ),
        "",
        "## Times",
        "",
        "x floor: over the time that the arrays' bytes take at 3.35 TB/s, or the products at 989 TFLOP/s, whichever is more. Library: the same call on",
        "cuDNN, jax-linear-attention, lax.conv or jnp.fft. Peer: flash-linear-attention or torch. Before: the kernel's first time, where it has been replaced.",
        "N spans: of time, chosen by hand; rows without a note take the kernel's own choice.",
        "",
        "| case | forward, ms | x floor | before | library | peer | with gradients, ms | x floor | before | library | peer |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(row, result) for row in result["times"] if row["form"] == "pallas_gpu" and not _is_stale(row, result)),
        "",
        *_pretraining(result),
        "## Predictions",
        "",
        "Made from compiled programs before any kernel had run (benchmarks/first_contact/predictions.py).",
        "",
        "| case | predicted, ms | measured | | why |",
        "|---|---|---|---|---|",
        *(_answer(prediction, result) for prediction in PREDICTIONS),
        "",
    ]
    return "\n".join(lines)


def _is_stale(row: dict[str, Any], result: dict[str, Any]) -> bool:
    """Returns whether a row of forced block sizes is older than another of its case: it may be of a kernel that has
    been replaced."""
    same = [other for other in result["times"] if (other["what"], other["form"]) == (row["what"], row["form"])]
    return bool(row.get("note")) and any(other["contact"] > row["contact"] for other in same)


def _row(row: dict[str, Any], result: dict[str, Any]) -> str:
    cells = [f"{row['what']} {row.get('note', '')}".strip()]
    for part in ("forward", "both"):
        seconds, floor = row.get(part), (row.get("floor") or {}).get(part)
        before = (row.get("before") or {}).get(part)
        cells.append("-" if seconds is None else f"{1e3 * seconds:.3f}")
        cells.append("-" if seconds is None or not floor else f"{seconds / floor:.2f}")
        cells.append("" if before is None else f"{1e3 * before:.3f}")
        cells.append("" if row.get("note") else _library(row, part, result))
        cells.append("" if row.get("note") else _peer(row, part, result))
    return "| " + " | ".join(cells) + " |"


def _library(row: dict[str, Any], part: str, result: dict[str, Any]) -> str:
    beside = [x for x in result["times"] if x["what"] == row["what"] and x["form"] in LIBRARIES and part in x]
    return "; ".join(f"{x['form']} {1e3 * x[part]:.3f}" for x in beside)


def _peer(row: dict[str, Any], part: str, result: dict[str, Any]) -> str:
    sizes = " ".join(f"{name}{size}" for name, size in row["sizes"].items())
    for what, peer in result["peers"].items():
        name, _, of = what.partition(" ")
        if row["what"] == f"{PEERS.get(name)}, {of}" and of == sizes and part in peer:
            # Then forward alone is not what a user of the peer would run.
            odd = (
                " (more than with gradients)" if part == "forward" and peer.get("both", peer[part]) < peer[part] else ""
            )
            return f"{name} {1e3 * peer[part]:.3f}{odd}"
    return ""


def _pretraining(result: dict[str, Any]) -> list[str]:
    if not result["pretraining"]:
        return []
    rows = [
        f"| {name} | {row['tokens_per_second']:,.0f} | {row.get('mfu', 0):.1%} | {row['step_seconds']:.3f} | {row['rows']} x {row['length']} | "
        f"{row['waiting_for_data']:.2%} |"
        for name, row in result["pretraining"].items()
    ]
    return [
        "## Pretraining",
        "",
        "| experiment | tokens/s | MFU | s per step | tokens per step | waiting for data |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _answer(prediction: Any, result: dict[str, Any]) -> str:
    span = f"{prediction.low:.2f} to {prediction.high:.2f}"
    what = f"{prediction.what} {prediction.note} ({'forward' if prediction.part == 'forward' else 'with gradients'})"
    if prediction.replaced:
        return f"| {what} | {span} | not measured before the kernel was replaced | | |"
    for row in result["times"]:
        if (row["what"], row["form"], row.get("note", "")) == (prediction.what, prediction.form, prediction.note):
            seconds = (row.get("before") or {}).get(prediction.part, row.get(prediction.part))
            if seconds is not None:
                right = prediction.low <= 1e3 * seconds <= prediction.high
                return f"| {what} | {span} | {1e3 * seconds:.3f} | {'right' if right else 'wrong'} | {prediction.why} |"
    return f"| {what} | {span} | not measured | | |"
