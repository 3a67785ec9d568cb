"""Short names for dotted paths of a config: the last parts that tell a field from the others."""

from __future__ import annotations

from collections.abc import Iterable


def short_paths(paths: Iterable[str], others: Iterable[str] = ()) -> dict[str, str]:
    """Returns the shortest ending of each path that means no other one; it does not begin with an index.

    An ending that several paths have means the one with the fewest parts, if there is one: "pairs" is `data.pairs`
    beside `data.evaluation.0.pairs`.

    Args:
      others: further paths that an ending must not mean.
    """
    paths = list(paths)
    depths: dict[str, list[int]] = {}
    for path in {*paths, *others}:
        parts = path.split(".")
        for start in range(len(parts)):
            depths.setdefault(".".join(parts[start:]), []).append(len(parts))

    def short(path: str) -> str:
        parts = path.split(".")
        for start in reversed(range(len(parts))):
            same = depths[ending := ".".join(parts[start:])]
            if not parts[start].isdigit() and len(parts) == min(same) and same.count(len(parts)) == 1:
                return ending
        return path

    return {path: short(path) for path in paths}
