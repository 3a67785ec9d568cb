"""Makes results and documents of what a first contact with a GPU brought back: predicted, measured, peer and floor, one
line per case.

    python main.py bench device --from FOLDER [FOLDER ...]          # print the comparison
    python main.py bench device --from FOLDER [FOLDER ...] --out    # also write it
    python main.py bench device --from benchmarks/results/DEVICE/first_contact.json FOLDER [FOLDER ...] --out

The last adds to what is kept. Written are benchmarks/results/DEVICE/first_contact.json and docs/gpu_measured.md.
FOLDERs hold first_contact.jsonl, as `python3 -m recollect.benchmarks.first_contact` writes it, from one kind of device;
of a case in several, the last counts, and the kernel's first time is kept beside it as `before`. A first_contact.json
in front stands for the folders that it was made of. Nothing here runs on a device.
"""

import collections
import copy
import json
from pathlib import Path

from recollect.benchmarks import peer_side, reporting
from recollect.benchmarks.first_contact import predictions, records
from recollect.configuration import UserError

DOCUMENT = "gpu_measured.md"
OPTIONS = {
    "from": {
        "dest": "folders",
        "nargs": "+",
        "type": Path,
        "required": True,
        "metavar": "FOLDER",
        "help": "with first_contact.jsonl; in front of them maybe a first_contact.json, to add to",
    }
}
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
    "begun": (),
    "probe": ("what",),
    "check": ("what", "wrong", "same_bits"),
    "time": ("what", "form", "sizes"),
    "peer": ("what",),
    "pretraining": ("what", "tokens_per_second", "step_seconds", "rows", "length", "waiting_for_data"),
    "tests": ("summary",),
    "failed": (),
}
KEPT = {"tests": [], "peers": {}, "pretraining": {}, "failed": [], "contacts": [], "checks": [], "times": []}
"""The parts of a result beside "device"."""
LIBRARIES = ("cudnn", "jla", "lax.conv", "jnp.fft", "all heads, cudnn")


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; 1 if a kernel was wrong.

    Raises:
      UserError: a folder without records, or records of two kinds of device.
    """
    parser = reporting.Parser("device", __doc__, OPTIONS, "first_contact.json, and docs/gpu_measured.md here")
    options = parser.parse(arguments)
    result = gathered(options.folders)
    text = document(result)
    print(text)
    if options.out is not None:
        folder = reporting.folder_name(result["device"])
        path = reporting.write_result(options.out, folder, "first_contact.json", result)
        page = reporting.REPOSITORY / "docs" / DOCUMENT
        page.write_text(text)
        print(f"written: {path}, {page}")
    return int(any(check["wrong"] for check in result["checks"]))


def gathered(folders: list[Path]) -> dict:
    """Returns what the folders' records say, by kind; the first of `folders` may be a file of such a result, which they
    add to.

    Raises:
      UserError: a folder without records, a file of something else, or records of two kinds of device.
    """
    add = folders[0].is_file()
    kept = _kept(folders[0]) if add else copy.deepcopy(KEPT)
    checks = {check["what"]: check for check in kept["checks"]}
    times = {_key(line): line for line in kept["times"]}
    devices = [kept["device"] for contact in kept["contacts"] if "machine" in contact]
    for folder in folders[1:] if add else folders:
        lines = _lines(folder)
        of = {kind: [line for line in lines if line["kind"] == kind] for kind in NEEDED}
        devices += [line["device"] for line in of["probe"] if line["what"] == "machine"]
        commands = "; ".join(str(line.get("command")) for line in of["begun"])
        contact = {"date": next((line.get("date") for line in of["begun"]), None), "command": commands}
        kept["contacts"].append(contact | {line["what"]: _facts(line) for line in of["probe"]})
        checks |= {line["what"]: _facts(line) for line in of["check"]}
        for line in of["time"]:
            before = _before(times.get(_key(line), {}), len(devices))
            times[_key(line)] = {**_facts(line), "contact": len(devices), **before}
        for kind, part in (("peer", "peers"), ("pretraining", "pretraining")):
            for line in of[kind]:
                name = " ".join([line["what"], *(x for x in line.get("overrides", ()) if "=" in x)])
                kept[part][name] = _facts(line)
        for kind in ("tests", "failed"):
            kept[kind] += map(_facts, of[kind])
    if len(set(devices)) != 1:
        names = ", ".join(sorted(set(devices))) or "no device"
        raise UserError(f"bench device: the folders are of {names}; one kind is needed")
    return {"device": devices[0], **kept, "checks": list(checks.values()), "times": list(times.values())}


def _lines(folder: Path) -> list[dict]:
    """Returns a folder's records, each with what is needed of its kind."""
    path = folder / records.FILE
    lines = records.read(path) if path.is_file() else []
    if not lines:
        raise UserError(f"bench device: {folder} has no {records.FILE}, or one without a record")
    for line in lines:
        machine = ("device", "versions") if (line["kind"], line.get("what")) == ("probe", "machine") else ()
        lacking = [name for name in (*NEEDED.get(line["kind"], ()), *machine) if name not in line]
        if lacking:
            raise UserError(f"bench device: {path}: a line of kind {line['kind']!r} lacks {', '.join(lacking)}")
    return lines


def _key(line: dict) -> tuple[str, str, str]:
    return line["what"], line["form"], line.get("note", "")


def _before(earlier: dict, contact: int) -> dict:
    """Returns {"before": a case's first time}, of an earlier contact; {} where there is none."""
    if earlier.get("contact") == contact and "before" not in earlier:
        return {}
    before = earlier.get("before") or {part: earlier[part] for part in ("forward", "both") if part in earlier}
    return {"before": before} if before else {}


def _kept(path: Path) -> dict:
    try:
        result = json.loads(path.read_text())
        return {name: result[name] for name in ("device", *KEPT)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"bench device: {path} is no result of bench device ({peer_side.one_line(error)})") from None


def _facts(line: dict) -> dict:
    return {name: x for name, x in line.items() if name not in ("kind", "step", "at")}


BESIDE = "x floor | before | library | peer"
HEADER = f"| case | forward, ms | {BESIDE} | with gradients, ms | {BESIDE} |"
EXPLANATION = """
x floor: over the time that the arrays' bytes take at 3.35 TB/s, or the products at 989 TFLOP/s, whichever is more. \
Library: the same call on
cuDNN, jax-linear-attention, lax.conv or jnp.fft. Peer: flash-linear-attention or torch. \
Before: the kernel's first time, where it has been replaced.
N spans: of time, chosen by hand; rows without a note take the kernel's own choice.
"""


def document(result: dict) -> str:
    """Returns the page: machine, checks, times beside peers and floors, pretraining, predictions answered."""
    first = next(contact for contact in result["contacts"] if "machine" in contact)
    versions, rates = first["machine"]["versions"], first.get("ceilings", {})
    dates = ", ".join(dict.fromkeys(str(contact["date"]) for contact in result["contacts"]))
    wrong = [check for check in result["checks"] if check["wrong"]]
    lines = [
        f"# Measured on one {result['device']}",
        "",
        "Made by `python main.py bench device` from what `python3 -m recollect.benchmarks.first_contact` brought back "
        f"on {dates}. jax {versions.get('jax')},",
        f"cuDNN {versions.get('nvidia-cudnn-cu13', 'not here')}, torch {versions.get('torch', 'not here')}. A large "
        f"copy moves {rates.get('copy_bytes_per_second', 0) / 1e12:.2f} TB/s (read and written), an 8,192^3",
        f"product in bf16 runs at {rates.get('product_flops_per_second', 0) / 1e12:.0f} TFLOP/s. Everything is bf16; "
        "times are medians of 10 turns.",
        "",
        "## Checks",
        "",
        f"{len(result['checks'])} comparisons with float64, outputs and gradients, odd lengths, documents, and rows at "
        f"full size: {len(result['checks']) - len(wrong)} within their bars. "
        f"{sum(check['same_bits'] for check in result['checks'])} gave the same bits twice.",
        *(f"- WRONG: {check['what']}: {', '.join(check['wrong'])}" for check in wrong),
        *(line for tests in result["tests"] for line in _tests(tests)),
        "",
        "## Times",
        EXPLANATION,
        HEADER,
        "|---" * 11 + "|",
        *(_row(row, result) for row in result["times"] if row["form"] == "pallas_gpu" and not _is_stale(row, result)),
        "",
        *_pretraining(result),
        "## Predictions",
        "",
        "Made from compiled programs before any kernel had run (benchmarks/first_contact/predictions.py).",
        "",
        "| case | predicted, ms | measured | | why |",
        "|---|---|---|---|---|",
        *(_answer(prediction, result) for prediction in predictions.PREDICTIONS),
        "",
    ]
    return "\n".join(lines)


def _is_stale(row: dict, result: dict) -> bool:
    """Returns whether a row of forced block sizes is older than another of its case: it may be of a kernel that has
    been replaced."""
    same = (other for other in result["times"] if _key(other)[:2] == _key(row)[:2])
    return bool(row.get("note")) and any(other["contact"] > row["contact"] for other in same)


def _row(row: dict, result: dict) -> str:
    cells = [f"{row['what']} {row.get('note', '')}".strip()]
    for part in ("forward", "both"):
        seconds, floor = row.get(part), (row.get("floor") or {}).get(part)
        times_floor = "-" if seconds is None or not floor else f"{seconds / floor:.2f}"
        cells += [_milliseconds(seconds, "-"), times_floor, _milliseconds((row.get("before") or {}).get(part), "")]
        cells += ["", ""] if row.get("note") else [_library(row, part, result), _peer(row, part, result)]
    return _table_row(cells)


def _milliseconds(seconds: float | None, otherwise: str) -> str:
    return otherwise if seconds is None else f"{1e3 * seconds:.3f}"


def _table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _library(row: dict, part: str, result: dict) -> str:
    return "; ".join(
        f"{other['form']} {1e3 * other[part]:.3f}"
        for other in result["times"]
        if other["what"] == row["what"] and other["form"] in LIBRARIES and part in other
    )


def _peer(row: dict, part: str, result: dict) -> str:
    sizes = " ".join(f"{name}{size}" for name, size in row["sizes"].items())
    for name, case in PEERS.items():
        peer = result["peers"].get(f"{name} {sizes}", {})
        if row["what"] == f"{case}, {sizes}" and part in peer:
            # Then forward alone is not what a user of the peer would run.
            odd = part == "forward" and peer.get("both", peer[part]) < peer[part]
            return f"{name} {1e3 * peer[part]:.3f}" + (" (more than with gradients)" if odd else "")
    return ""


def _tests(tests: dict) -> list[str]:
    names = (name.removeprefix("tests/pallas_kernels/").partition("[")[0] for name in tests.get("failed", ()))
    return [
        f"\nThe tests that are simulated elsewhere, run on the device: {tests['summary']}.",
        *(f"- failed: {test}" + (f" ({n} cases)" if n > 1 else "") for test, n in collections.Counter(names).items()),
    ]


def _pretraining(result: dict) -> list[str]:
    if not result["pretraining"]:
        return []
    return [
        "## Pretraining",
        "",
        "`bench pretraining`, data included, medians of three steps. Peer: torch on the same shapes "
        "(benchmarks/pretraining_peer.py), without data.",
        "",
        "| experiment | vocabulary | tokens per step, in pieces | tokens per second | MFU | s per step "
        "| peak memory, GiB | waiting for data | peer |",
        "|---" * 9 + "|",
        *(_trained(row) for row in result["pretraining"].values()),
        "",
    ]


PEER_CELLS = {
    "error": "error: {error}",
    "tokens_per_second": "{version}: {tokens_per_second:,.0f} tokens per second",
    "mfu": "MFU {mfu:.1%}",
}
"""What the page says of a peer's training, by what is known of it."""


def _trained(row: dict) -> str:
    peer = row.get("peer", {})
    return _table_row(
        [
            " ".join([row["what"], *(x for x in row.get("overrides", ()) if x.startswith("model."))]),
            f"{row['vocabulary']:,}" if "vocabulary" in row else "",
            f"{row['rows']} x {row['length']}" + (f", {row['pieces']}" if "pieces" in row else ""),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}" if "mfu" in row else "",
            f"{row['step_seconds']:.3f}",
            f"{row['peak_bytes'] / 2**30:.1f}" if row.get("peak_bytes") else "",
            f"{row['waiting_for_data']:.2%}",
            ", ".join(text.format(**peer) for name, text in PEER_CELLS.items() if name in peer),
        ]
    )


def _answer(prediction: predictions.Prediction, result: dict) -> str:
    part, key = prediction.part, (prediction.what, prediction.form, prediction.note)
    what = f"{prediction.what} {prediction.note} ({'forward' if part == 'forward' else 'with gradients'})"
    cells = [what, f"{prediction.low:.2f} to {prediction.high:.2f}"]
    row = next((row for row in result["times"] if _key(row) == key), {})
    seconds = (row.get("before") or {}).get(part, row.get(part))
    if prediction.replaced or seconds is None:
        when = " before the kernel was replaced" if prediction.replaced else ""
        return f"{_table_row([*cells, f'not measured{when}'])} | |"
    verdict = "right" if prediction.low <= 1e3 * seconds <= prediction.high else "wrong"
    return _table_row([*cells, f"{1e3 * seconds:.3f}", verdict, prediction.why])
