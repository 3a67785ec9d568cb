"""Which split a file belongs to: by its name, by the folders that it lies in, or by the card of its data set.

    split_by_name("data/train-00000-of-00003.parquet")       # "train"
    split_by_name("wiki.valid.tokens")                       # "validation"
    split_by_name("a test of patience.txt")                  # None

A name says a split where its word stands alone, or last before numbers and suffixes; first will do for a file of many
rows. A file's name counts before those of its folders. The card of a Hugging Face data set is its README.md, whose YAML
head may list the files of each split under `configs:`; what it lists counts before all names, and what it doesn't is
no data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recollect.configuration import UserError
from recollect.configuration.io import first_line

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The splits, and how they are written in names."""

CARD = "README.md"
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_NO_WORD = re.compile(r"of|\d+|[0-9a-f]{16,}|data|dataset|set|split|part|shard|chunk|file")
_SUFFIXES_OF_ROWS = frozenset({"jsonl", "ndjson", "json", "parquet", "arrow", "feather", "csv", "tsv"})


def split_by_name(name: str) -> str | None:
    """Returns "train", "validation" or "test", as a file's path says within its source; None where it says nothing."""
    *folders, file = name.lower().split("/")
    words, has_rows = _words(file)
    said = [words[-1:], words[:1] if has_rows else [], *(_words(f"{folder}.")[0][-1:] for folder in reversed(folders))]
    return next((_SPLIT_OF[word] for words in said for word in words if word in _SPLIT_OF), None)


def _words(name: str) -> tuple[list[str], bool]:
    """Returns the words of a name without suffixes, numbers of shards and the like; and whether the file has rows."""
    words = [word for word in re.split(r"[._\- ]+", name) if word]
    has_rows = False
    # All suffixes go but those that are words themselves: train.txt.gz, wiki.train.tokens.
    while len(words) > 1 and name.endswith(f".{words[-1]}") and words[-1] not in _SPLIT_OF:
        has_rows |= words[-1] in _SUFFIXES_OF_ROWS
        name = name[: -len(words.pop()) - 1]
    return [word for word in words if not _NO_WORD.fullmatch(word)], has_rows


def splits_of_card(root: Path, config: str | None) -> dict[Path, str] | None:
    """Returns the split of each file that the card in a folder lists under `configs:`; None where it lists none.

    Args:
      root: the folder.
      config: the name of one of its configurations; None for the only one, or the default.

    Raises:
      UserError: no such configuration, several to choose from, or one that cannot be understood.
    """
    configs = _configs(root / CARD)
    if not configs:
        if config is not None:
            raise UserError(f"config={config!r}: {root / CARD} lists no configurations")
        return None
    names = [str(entry.get("config_name", "default")) for entry in configs]
    defaults = [entry for entry in configs if entry.get("default") is True or entry.get("config_name") == "default"]
    chosen = [entry for entry, name in zip(configs, names, strict=True) if name == config] if config else defaults
    if not chosen and config is None and len(configs) == 1:
        chosen = configs
    if not chosen:
        problem = f"config={config!r}: is not among" if config else f"{root / CARD}: choose with --config one of"
        raise UserError(f"{problem} its configurations {', '.join(names)}")
    folder = root / str(chosen[0].get("data_dir") or "")
    found: dict[Path, str] = {}
    for split, pattern in _patterns(chosen[0].get("data_files"), root / CARD):
        try:
            files = sorted(path for path in folder.glob(pattern) if not path.is_dir())
        except (ValueError, NotImplementedError, OSError) as error:
            raise UserError(f"{root / CARD}: cannot look for {pattern!r} ({first_line(error)})") from error
        if not files:
            raise UserError(
                f"{root / CARD}: lists {pattern!r} for the split {split}, and nothing here matches; --exclude {CARD} "
                "goes by the names of files instead"
            )
        found |= dict.fromkeys(files, _SPLIT_OF.get(split.lower(), split))
    return found


def _configs(card: Path) -> list[dict[str, Any]]:
    """Returns the configurations of a card that list files."""
    import yaml

    try:
        text = card.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{card}: cannot be read ({error.strerror})") from error
    head = re.match(r"\ufeff?---\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        content = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{card}: its head is not YAML that can be read ({first_line(error)})") from error
    configs = content.get("configs") if isinstance(content, dict) else None
    entries = configs if isinstance(configs, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and entry.get("data_files")]


def _patterns(data_files: Any, card: Path) -> Iterator[tuple[str, str]]:
    """Yields (split, pattern) of a configuration's `data_files`: a pattern, a list of them, or of splits with some."""
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        if isinstance(entry, str):
            yield "train", entry
            continue
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        paths = [paths] if isinstance(paths, str) else paths
        if (
            not isinstance(split, str)
            or not isinstance(paths, list)
            or not all(isinstance(path, str) for path in paths)
        ):
            raise UserError(f"{card}: its configs: cannot be understood at {entry!r}")
        yield from ((split, path) for path in paths)
