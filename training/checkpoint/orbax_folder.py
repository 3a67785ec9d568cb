"""Checkpoints: Orbax writes the arrays on its own threads while training goes on; a folder counts once it is whole,
sealed and renamed.

    checkpoints/STEP/state/        arrays, as Orbax lays them out
                     meta.json     the config, and what a run must know beside its arrays
                     digests.json  size and SHA-256 of every file above
    checkpoints/STEP.writing/      one that is being written; after a crash it is half a checkpoint, and is taken away
    checkpoints/damaged/STEP-N/    one that was found damaged

Orbax loads a flipped byte without a word, hence the digests. They are of files, so that finding damage takes no
decoding and no device, and that Orbax's own metadata is covered too. Every process of a run calls `save`, `wait` and
`load`; the first alone seals, renames and deletes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from recollect.configuration import Config, UserError, from_json, to_json
from recollect.training.checkpoint.integrity import DiskFull, damage, is_disk_full, seal, write_json
from recollect.training.distributed.collectives import from_main, largest
from recollect.training.distributed.processes import is_main

Say = Callable[[str], None]


class Checkpoints:
    """The checkpoints of one run, in `directory`/STEP.

    Attributes:
      seconds: how long the last save took, to the rename; 0 before the first one ended.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_every: int | None = None):
        """`keep` newest stay, and for ever the first at or after each multiple of `keep_every` steps."""
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.keep_every = keep_every
        self.seconds = 0.0
        self._writer: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._pending: int | None = None

    def steps(self) -> list[int]:
        """Steps saved and sealed, oldest first. Whether their files are still whole is `problem`'s to say."""
        return _steps(self.directory)

    def save(self, step: int, state: Any, config: Config, extra: dict[str, Any]) -> None:
        """Starts to save `state`, the config and JSON-ready `extra`; returns once the arrays are copied to the host.

        A step that is there already stays as it is. An earlier save that still runs is waited for.

        Raises:
          DiskFull, UserError: this save could not start, or the earlier one failed. What it had written is taken away.
        """
        self.wait()
        if from_main(int(step in self.steps())):
            return
        if jax.default_backend() == "cpu":
            # On a CPU the host's copy is a view of the device's buffer, which the next step is given to write into.
            state = jax.tree.map(jnp.copy, state)
        self._pending = step
        begun = time.perf_counter()
        writing = self._writing(step)
        try:
            if is_main():
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir(parents=True)
                write_json(writing / "meta.json", {"config": to_json(config), "extra": extra})
            import orbax.checkpoint as ocp

            if self._writer is None:
                self._writer = _writer()
            self._writer.save(writing / "state", args=ocp.args.PyTreeSave(state))
        except Exception as error:
            self._error = error
            if jax.process_count() == 1:
                self.wait()
            raise
        self._thread = threading.Thread(target=self._commit, args=(step, begun), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Returns once the save that was started, if any, is whole on the disk. Every process must call it.

        Raises:
          DiskFull, UserError: it failed; the checkpoints before it are as they were.
        """
        if self._pending is None:
            return
        if self._thread is not None:
            self._thread.join()
        step, error = self._pending, self._error
        self._thread = self._pending = self._error = None
        code = largest(0 if error is None else 2 if is_disk_full(error) else 1)
        if code == 0:
            return
        self._writer = None
        if is_main():
            shutil.rmtree(self._writing(step), ignore_errors=True)
        text = "another process could not write its part" if error is None else _first_line(error)
        last = self.steps()
        kept = f"; the last good one is of step {last[-1]}" if last else "; there is none before it"
        kind = DiskFull if code == 2 else UserError
        why = "no space is left on the disk" if code == 2 else text
        raise kind(f"checkpoint {self.directory / str(step)} could not be written: {why}{kept}") from error

    def failed(self) -> bool:
        """Whether the save that was started has failed already, so that `wait` would raise at once."""
        return self._error is not None and (self._thread is None or not self._thread.is_alive())

    def load(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The state of a step, every array placed as `abstract` asks, and `extra`. Files are not verified here: see
        `problem`.

        Args:
          abstract: a tree like the state saved, of arrays or ShapeDtypeStructs whose `sharding` says where each goes:
            another mesh, another number of devices or processes than the state was saved from. Without one it goes onto
            the first device.

        Raises:
          UserError: the checkpoint is of another structure, or cannot be read.
        """
        import orbax.checkpoint as ocp

        self.wait()
        where = self.directory / str(step)
        try:
            shapes = jax.tree.map(_placed, abstract)
            arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
            with _reader() as reader:
                state = reader.restore(
                    where / "state", args=ocp.args.PyTreeRestore(item=shapes, restore_args=arguments)
                )
            extra = json.loads((where / "meta.json").read_text())["extra"]
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise _unreadable(where, error) from error
        return state, extra

    def problem(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files, or None. Reads them all; the main process reads for every
        process."""
        found = damage(self.directory / str(step)) if is_main() else None
        if not from_main(int(found is not None)):
            return None
        return found or "the main process found it damaged"

    def set_aside(self, step: int, problem: str, say: Say) -> None:
        """Moves a damaged checkpoint to damaged/ and says so."""
        if is_main():
            folder = self.directory / "damaged"
            folder.mkdir(exist_ok=True)
            number = 1 + sum(path.name.startswith(f"{step}-") for path in folder.iterdir())
            say(f"checkpoint {self.directory / str(step)} is damaged: {problem}; set aside as damaged/{step}-{number}")
            os.rename(self.directory / str(step), folder / f"{step}-{number}")
        largest(0)

    def recover(self, say: Say) -> None:
        """Takes away what a process that died while saving has left, and says so. To be called before the first
        save."""
        if is_main() and self.directory.is_dir():
            for path in self.directory.glob("*.retired"):
                shutil.rmtree(path, ignore_errors=True)
            for path in sorted(self.directory.glob("*.writing")):
                say(
                    f"checkpoint {self.directory / path.stem} was cut off while it was written: what there is of it is taken away"
                )
                shutil.rmtree(path, ignore_errors=True)
        largest(0)

    def newest_good(self, say: Say = print, before: int | None = None) -> int | None:
        """The newest step (less than `before`, if given) whose files are whole; damaged ones on the way are named and
        set aside.

        Returns:
          None where no checkpoint was ever saved.

        Raises:
          UserError: there were checkpoints and all are damaged.
        """
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            problem = self.problem(step)
            if problem is None:
                return step
            self.set_aside(step, problem, say)
        self.refuse_if_all_damaged()
        return None

    def refuse_if_all_damaged(self) -> None:
        """Raises UserError when nothing but damaged checkpoints is left: starting again from step 0 must be the
        user's choice."""
        folder = self.directory / "damaged"
        if not self.steps() and folder.is_dir() and any(folder.iterdir()):
            names = ", ".join(sorted(path.name for path in folder.iterdir()))
            raise UserError(
                f"every checkpoint of {self.directory} is damaged ({names}); delete {folder} to start again from step 0"
            )

    def drop_after(self, step: int) -> None:
        """Deletes checkpoints of later steps: a run that goes on from `step` makes them again."""
        self.wait()
        if is_main():
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self.directory / str(later), ignore_errors=True)
        largest(0)

    def close(self) -> None:
        """Waits for a running save; raises as `wait` does."""
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _writing(self, step: int) -> Path:
        return self.directory / f"{step}.writing"

    def _commit(self, step: int, begun: float) -> None:
        try:
            self._writer.wait_until_finished()
            if is_main():
                writing = self._writing(step)
                seal(writing)
                os.rename(writing, self.directory / str(step))
                _flush_folder(self.directory)
                self._retire()
            self.seconds = time.perf_counter() - begun
        except BaseException as error:  # told by `wait`, in the thread that trains
            self._error = error

    def _retire(self) -> None:
        """Deletes what the policy does not keep; called only when a newer checkpoint's digests stand."""
        steps = self.steps()
        keep = set(steps[-self.keep :])
        if self.keep_every is not None:
            keep |= {
                step
                for last, step in zip([0, *steps], steps, strict=False)
                if step // self.keep_every > last // self.keep_every
            }
        for step in steps:
            if step not in keep:
                # Renamed first: a process that dies while deleting must not leave half a checkpoint under a good name.
                gone = self.directory / f"{step}.retired"
                os.rename(self.directory / str(step), gone)
                shutil.rmtree(gone, ignore_errors=True)


def load_params(directory: Path, *, ema: bool = False, say: Say | None = None) -> tuple[dict[str, Any], Config, int]:
    """Parameters (numpy), config and step of the newest good checkpoint in `directory`, structure read from the file
    itself.

    Every file of the checkpoint is verified; optimizer state is not read. A damaged checkpoint is named (`say`, by
    default on stderr) and left where it is, since a run may be using the folder; the one before it is taken.

    Args:
      ema: take the moving average of the parameters where the run kept one.

    Raises:
      UserError: no checkpoint, or all are damaged.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).absolute()
    steps = _steps(directory)
    if not steps:
        raise UserError(f"{directory} holds no checkpoint")
    problems = []
    for step in reversed(steps):
        where = directory / str(step)
        problem = damage(where)
        if problem is not None:
            problems.append(f"checkpoint {where} is damaged: {problem}")
            continue
        for line in problems:
            (say or _to_stderr)(f"{line}; taking step {step}")
        try:
            meta = json.loads((where / "meta.json").read_text())
            with _reader() as reader:
                tree = dict(reader.metadata(where / "state").item_metadata.tree)
                name = "ema" if ema and "ema" in tree else "params"
                shapes = jax.tree.map(_on_first_device, {name: tree[name]})
                arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
                state = reader.restore(
                    where / "state",
                    args=ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=True),
                )
            return jax.device_get(state[name]), from_json(meta["config"]), step
        except UserError:
            raise
        except Exception as error:  # as in load
            raise _unreadable(where, error) from error
    raise UserError("; ".join(problems))


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) if directory.is_dir() else []


def _writer() -> Any:
    """Orbax's asynchronous writer: `save` returns when the arrays are on the host."""
    import orbax.checkpoint as ocp

    _quiet()
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), async_options=options)


def _reader() -> Any:
    import orbax.checkpoint as ocp

    _quiet()
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _quiet() -> None:
    """Orbax logs every file it touches, and after a failed write its and TensorStore's threads print tracebacks of what
    `wait` tells in
    one line: of arrays whose writing nobody waits for any more."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.excepthook, _LoopClosed):
        sys.excepthook = _LoopClosed(sys.excepthook)


class _LoopClosed:
    """An excepthook without what TensorStore prints when it ends a write whose event loop has been closed."""

    def __init__(self, others: Any):
        self.others = others

    def __call__(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            self.others(kind, error, trace)


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    return (
        _on_first_device(leaf) if sharding is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    )


def _on_first_device(leaf: Any) -> jax.ShapeDtypeStruct:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:200]


def _unreadable(where: Path, error: Exception) -> UserError:
    return UserError(f"checkpoint {where} cannot be read: {_first_line(error)}")


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)
