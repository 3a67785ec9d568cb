"""What a preparation read and left out, in the manifest and in lines to print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recollect.data.text.preparation.file_parts import ReadFile
from recollect.data.text.preparation.listing import LeftOut
from recollect.data.text.preparation.splits import WORDS


def files_entry(
    read: Sequence[ReadFile], left_out: Sequence[LeftOut], tasks: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns what a manifest records of the files of a source, JSON-ready.

    Args:
      read, left_out: of the source.
      tasks: summaries of all tasks.
    """
    roles = {
        role: [file for file in read if file.role == role]
        for role in dict.fromkeys([*WORDS, *(file.role for file in read)])
    }
    empty = [task["empty"] for task in tasks]
    return {
        "read": {
            role: {"files": len(files), "bytes": sum(file.size for file in files), "first": files[0].name}
            for role, files in roles.items()
            if files
        },
        "left_out": by_reason(left_out),
        "empty": {
            "count": sum(entry["count"] for entry in empty),
            "first": next((entry["first"] for entry in empty if entry["first"]), None),
        },
    }


def by_reason(left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """Returns, for each reason of leaving something out, how many files and bytes, and the first of them."""
    reasons: dict[str, list[LeftOut]] = {}
    for one in left_out:
        reasons.setdefault(one.reason, []).append(one)
    return {
        reason: {
            "files": len(some),
            "bytes": sum(one.size for one in some),
            "first": some[0].name,
            "detail": some[0].detail,
        }
        for reason, some in reasons.items()
    }


def described(left_out: Sequence[LeftOut]) -> str:
    """Returns what was left out in one line."""
    return "; ".join(_line(reason, entry) for reason, entry in by_reason(left_out).items())


def _line(reason: str, entry: dict[str, Any]) -> str:
    first = f"{'first ' if entry['files'] > 1 else ''}{entry['first']}"
    detail = f": {entry['detail']}" if entry["detail"] else ""
    return f"{count(entry['files'], 'file')} ({count(entry['bytes'], 'byte')}), {reason}: {first}{detail}"


def summary_lines(manifest: dict[str, Any]) -> list[str]:
    """Returns lines: what became train, validation and test, what was left out and why, what is unknown."""
    files = manifest["files"]
    lines = [
        f"{role}: {count(entry['files'], 'file')} ({count(entry['bytes'], 'byte')}), the first {entry['first']}"
        + ("" if role == "train" else "; held out")
        for role, entry in files["read"].items()
    ]
    if len(lines) == 1:
        lines[0] += "; a share of the documents is held out"
    lines += [f"left out: {_line(reason, entry)}" for reason, entry in files["left_out"].items()]
    if files["empty"]["count"]:
        lines.append(f"without text: {count(files['empty']['count'], 'row')}, the first {files['empty']['first']}")
    for split, counts in manifest["splits"].items():
        if counts["unknown_bytes"]:
            share = counts["unknown_bytes"] / counts["bytes"]
            lines.append(f"unknown to the tokenizer: {share:.3%} of the {split} text")
    return lines


def count(number: int, noun: str) -> str:
    """Returns "1 file" or "2,000 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
