"""Checkpoints: Orbax for arrays, one JSON item beside them, and a digest of every array, verified on load.

Orbax loads a flipped byte without a word, so each leaf's SHA-256 goes into the JSON item.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configuration import Config, UserError, from_json, to_json


class Checkpoints:
    """The checkpoints of one run, in `directory`/STEP."""

    def __init__(self, directory: Path, keep: int = 2):
        import orbax.checkpoint as ocp

        # Orbax and absl log every file they touch.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = Path(directory).absolute()
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=False, single_host_load_and_broadcast=False
            ),
        )

    def steps(self) -> list[int]:
        """Steps saved, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, config: Config, extra: dict[str, Any]) -> None:
        """Saves `state`, the config and JSON-ready `extra`; a step that is there already stays as it is."""
        if step in self._manager.all_steps():
            return
        host = jax.device_get(state)
        meta = {"config": to_json(config), "extra": extra, "digests": digests(host)}
        ocp = self._ocp
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(host), meta=ocp.args.JsonSave(meta)))
        self._manager.wait_until_finished()

    def load(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """State (numpy) and `extra` of a step.

        Args:
          abstract: a tree of arrays or ShapeDtypeStructs like the state saved.

        Raises:
          UserError: the checkpoint is damaged, or is of another structure.
        """
        ocp = self._ocp
        where = self.directory / str(step)
        shapes = _on_one_device(abstract)
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), meta=ocp.args.JsonRestore())
            )
        except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
            raise _unreadable(where, error) from error
        state, meta = jax.device_get(restored["state"]), restored["meta"]
        found = digests(state)
        wrong = sorted(name for name in meta["digests"] if meta["digests"][name] != found.get(name))
        if wrong:
            raise UserError(f"checkpoint {where} is damaged: {wrong[0]} does not match its digest ({len(wrong)} of {len(found)} arrays)")
        return state, meta["extra"]

    def close(self) -> None:
        self._manager.close()

    def clear(self) -> None:
        """Deletes all checkpoints of this run."""
        for step in self.steps():
            shutil.rmtree(self.directory / str(step))
        self._manager.reload()


def load_params(directory: Path) -> tuple[dict[str, Any], Config, int]:
    """Parameters (numpy), config and step of the newest checkpoint in `directory`, structure read from the file itself.

    Raises:
      UserError: no checkpoint, or a damaged one.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    directory = Path(directory).absolute()
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []
    if not steps:
        raise UserError(f"{directory} holds no checkpoint")
    where = directory / str(steps[-1])
    try:
        meta = json.loads((where / "meta" / "metadata").read_text())
        with ocp.StandardCheckpointer() as reader:
            shapes = _on_one_device(dict(reader.metadata(where / "state").item_metadata.tree))
            state = jax.device_get(reader.restore(where / "state", shapes))
    except Exception as error:  # as in load
        raise _unreadable(where, error) from error
    found = digests(state["params"], "params")
    for name, digest in found.items():
        if meta["digests"].get(name) != digest:
            raise UserError(f"checkpoint {where} is damaged: {name} does not match its digest")
    return state["params"], from_json(meta["config"]), steps[-1]


def digests(tree: Any, prefix: str = "") -> dict[str, str]:
    """SHA-256 of every array's dtype, shape and bytes, by path."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [prefix] if prefix else []
        names += [str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry)))) for entry in path]
        array = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
        found[".".join(names)] = digest.hexdigest()
    return found


def _on_one_device(tree: Any) -> Any:
    """What to restore: the tree's shapes and dtypes, placed on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def _unreadable(where: Path, error: Exception) -> UserError:
    message = str(error).strip() or type(error).__name__
    return UserError(f"checkpoint {where} cannot be read: {message.splitlines()[0][:200]}")
