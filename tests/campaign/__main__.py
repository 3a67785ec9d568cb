"""The fault campaign: runs are killed, damaged, starved of disk and fed NaN, started again, and compared with
undisturbed ones.

    python -m tests.campaign [--faults 70] [--seed 0] [--short]

Prints a line a fault, and exits with code 1 if anything was lost: a bit of the parameters, of the optimizer's state, or
of a line of metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.quick_compilation import XLA_FLAGS

TEXT_ONLY = ("NaN batches in a row", "console that cannot print", "moved data folder", "full disk in prepare")


def main() -> int:
    """Parses the arguments, makes the references, shares the faults out to processes and prints what they found."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=70, help="how many (at least 16 have every kind)")
    parser.add_argument("--seed", type=int, default=0, help="decides moments, files and bits")
    parser.add_argument("--short", action="store_true", help="18 faults, every kind at least once")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that work at once")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folders")
    given = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="campaign-"))
    # Read when jax is imported.
    os.environ.update(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=XLA_FLAGS,
        JAX_COMPILATION_CACHE_DIR=str(work / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        RECOLLECT_CACHE=str(work / "cache"),
        TQDM_DISABLE="1",
    )
    begun = time.monotonic()
    try:
        from tests.campaign.faults import KINDS, SHARES
        from tests.training.tiny import write_corpus

        write_corpus(work / "corpus")
        faults = plan(KINDS, SHARES, 18 if given.short else given.faults, given.seed)
        references(work)
        print(f"{len(faults)} faults, seed {given.seed}; references made in {time.monotonic() - begun:.0f} s")
        rows = share_out(work, faults, given.seed, given.jobs)
    finally:
        if given.keep:
            print(f"runs: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    bad = [row for row in rows if row["lost"]]
    print(
        f"{len(rows)} faults, {len(rows) - len(bad)} lost nothing, {len(bad)} lost something; "
        f"{time.monotonic() - begun:.0f} s"
    )
    return 1 if bad or len(rows) < len(faults) else 0


def plan(kinds: tuple[str, ...], shares: tuple[int, ...], count: int, seed: int) -> list[tuple[str, str]]:
    """(kind, run) of each fault: every kind once, the others by their shares, both runs in turn
    (`TEXT_ONLY`: text, which has samples and a corpus, and whose batches come from outside of the program)."""
    order = random.Random(seed)
    more = [kind for kind, share in zip(kinds, shares, strict=True) for _ in range(share - 1)]
    order.shuffle(more)
    chosen = [*kinds, *(more * (1 + count // max(1, len(more))))[: max(0, count - len(kinds))]][:count]
    runs = {kind: order.randrange(2) for kind in kinds}
    found = []
    for kind in chosen:
        runs[kind] += 1
        found.append((kind, "text" if kind in TEXT_ONLY else ("recall", "text")[runs[kind] % 2]))
    order.shuffle(found)
    return found


def references(work: Path) -> None:
    """The undisturbed runs: plain, with a NaN batch, and with too many of them; and how long a run takes to start
    and to train."""
    from tests.campaign.faults import poison
    from tests.campaign.runs import Process, experiment_of, remains

    folder = work / "references"
    folder.mkdir()
    # The last one of each finds its programs compiled, as runs with faults do: NaN comes to text from outside of the
    # program.
    wanted = {
        "recall": (("recall", 0), ("recall-nan", 1), ("recall-again", 0)),
        "text": (("text", 0), ("text-diverged", 3), ("text-nan", 1)),
    }
    for run, names in wanted.items():
        for name, bad in names:
            prepare = poison(run, bad) if bad else None
            process = Process(experiment_of(run, folder / name, work / "corpus"), folder / f"{name}.txt", prepare)
            while process.poll() is None and not (folder / name / "metrics.jsonl").exists():
                time.sleep(0.005)
            started = time.monotonic()
            if process.wait() != 0:
                raise SystemExit(f"the undisturbed run {name} failed:\n{process.output}")
            (folder / f"{name}.json").write_text(json.dumps(remains(folder / name)))
        seconds = {"start": started - process.begun, "train": time.monotonic() - started}
        (folder / f"{run}-seconds.json").write_text(json.dumps(seconds))
    if (folder / "recall.json").read_text() != (folder / "recall-again.json").read_text():
        raise SystemExit("two undisturbed runs differ, so no fault can be judged")


def share_out(work: Path, faults: list[tuple[str, str]], seed: int, jobs: int) -> list[dict[str, str]]:
    """Does the faults in `jobs` processes and prints their lines as they come."""
    from tests.campaign.faults import course

    pids = []
    for job in range(jobs):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            for number, (kind, run) in enumerate(faults):
                if number % jobs == job:
                    try:
                        row = vars(course(work, number, kind, run, seed))
                    except BaseException:
                        error = " ".join(traceback.format_exc().split())[-300:]
                        row = {
                            "fault": kind,
                            "run": run,
                            "moment": "",
                            "said": "",
                            "lost": f"the campaign failed: {error}",
                        }
                    (work / f"row-{number}.new").write_text(json.dumps(row))
                    os.replace(work / f"row-{number}.new", work / f"row-{number}")
            os._exit(0)
        pids.append(pid)
    rows: list[dict[str, str]] = []
    alive = set(pids)
    while alive or len(rows) < len(list(work.glob("row-*[0-9]"))):
        for pid in list(alive):
            if os.waitpid(pid, os.WNOHANG)[0]:
                alive.discard(pid)
        while (path := work / f"row-{len(rows)}").exists():
            rows.append(json.loads(path.read_text()))
            row = rows[-1]
            outcome = f"LOST: {row['lost']}" if row["lost"] else "nothing lost"
            print(f"{len(rows):3} {row['run']:6} {row['fault']:24} {outcome}")
            print(f"{'':11}{row['moment']}")
            print(f"{'':11}{row['said'][:260]}", flush=True)
        time.sleep(0.05)
    return rows


if __name__ == "__main__":
    sys.exit(main())
