"""Code of the user's that a run was trained with: recorded in its folder, and run again when the run is used.

    user_code.json            {"load": [path], "files": {path: {"sha256": digest, "copy": path within the run folder}}}
    user_code/DIGEST/...      the files as they were, one folder per version

A run folder may come from anybody, and what it holds is never run because it says so. Its code is run without being
asked for (`--with FILE`) only where every file has the digest of one that a command of this user has run on this
machine before (configuration/python_files.py notes them in the cache folder). The files are verified as they are run,
and no others beside them are run.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import write_json
from recollect.configuration.python_files import USER_FILES, digest_of, load_definitions, was_run_here
from recollect.configuration.read_json import read_json_object
from recollect.training.distributed.host import current_host

RECORD, COPIES = "user_code.json", "user_code"


def record(folder: Path) -> None:
    """Writes which files of the user's this process has run, and copies of them, into the folder of a run that is about
    to train; warns where an earlier part of the run was trained with others."""
    if not current_host().is_main:
        return
    entry: dict[str, Any] = {"load": [], "files": {}}
    folders = list(dict.fromkeys(path.parent for path in USER_FILES))
    digests = sorted(f"{one} {digest}" for file in USER_FILES.values() for one, digest in file.digests.items())
    version = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
    for path, file in USER_FILES.items():
        entry["load"].append(str(path))
        for one, digest in file.digests.items():
            copy = Path(COPIES) / version / str(folders.index(path.parent)) / one.relative_to(path.parent)
            entry["files"][str(one)] = {"sha256": digest, "copy": str(copy)}
            (folder / copy).parent.mkdir(parents=True, exist_ok=True)
            (folder / copy).write_bytes(file.sources[one])
    before = read_json_object(folder / RECORD) if (folder / RECORD).exists() else {}
    for one, now in entry["files"].items():
        then = before.get("files", {}).get(one, now)
        if then["sha256"] != now["sha256"]:
            change = f"sha256 {then['sha256'][:12]} then, {now['sha256'][:12]} now"
            _warn(f"{one} has changed since {folder} was trained ({change}); the run goes on with it as it is now")
    write_json(folder / RECORD, entry)


def recorded_files(folder: Path) -> dict[str, bytes]:
    """Returns the record and the copies in a run's folder by their paths in it, for an export of the run; {} where it
    has none. Nothing is run; a copy that is missing is left out, and named when the export is used."""
    if not (folder / RECORD).is_file():
        return {}
    copies = [Path(one["copy"]) for one in _read(folder)["files"].values()]
    whole = (folder / COPIES).resolve()
    inside = [
        str(copy)
        for copy in copies
        if copy.parts[:1] == (COPIES,) and ".." not in copy.parts and (folder / copy).resolve().is_relative_to(whole)
    ]
    return {name: (folder / name).read_bytes() for name in (RECORD, *inside) if (folder / name).is_file()}


def run_recorded(folder: Path) -> None:
    """Runs the code of the user's that a run was trained with, so that its classes are known by name. The files where
    they were, if they are unchanged; else the copies in the run's folder, with a warning.

    Args:
      folder: of the run, or of a failed step in it.

    Raises:
      UserError: some of it has not been run on this machine by a command of this user, or is missing.
    """
    root = next((place for place in (folder, *folder.absolute().parents[:2]) if (place / RECORD).is_file()), None)
    if root is None:
        return
    entry = _read(root)
    files: dict[Path, tuple[str, Path]] = {
        Path(path): (one["sha256"], root / one["copy"]) for path, one in entry["files"].items()
    }
    for path, (digest, copy) in files.items():
        if not was_run_here(digest):
            said = f"{folder} was trained with {path} (sha256 {digest[:12]}), which has not been run on this machine"
            named = shlex.quote(str(files[Path(entry["load"][0])][1]))
            raise UserError(f"{said}: read {copy}, and allow it with --with {named}")
    digests = {digest for digest, _ in files.values()}
    for path in map(Path, entry["load"]):
        beside = {one: version for one, version in files.items() if one.is_relative_to(path.parent)}
        differing = [(one, *version) for one, version in beside.items() if digest_of(one) != version[0]]
        for one, digest, copy in differing:
            now = digest_of(one)
            change = f"has changed since (sha256 {digest[:12]} then, {now[:12]} now)" if now else "is no longer there"
            _warn(f"{one}, which {root} was trained with, {change}; taking the copy {copy}")
        for one, (digest, copy) in beside.items() if differing else ():
            if digest_of(copy) != digest:
                raise UserError(f"{root} needs {one}, and its copy {copy} is missing or changed: give one with --with")
        load_definitions(beside[path][1] if differing else path, digests)


def _read(root: Path) -> dict[str, Any]:
    entry = read_json_object(root / RECORD)
    try:
        files = {path: (one["sha256"] + "", one["copy"] + "") for path, one in entry["files"].items()}
        whole = bool(entry["load"]) and all(path in files for path in entry["load"])
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{root / RECORD} is damaged; give the file that the run was trained with as --with FILE")
    return entry


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
