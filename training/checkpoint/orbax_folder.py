"""Checkpoints of a run: Orbax writes, renames and retires them; SHA-256 digests prove that they are whole.

    checkpoints/STEP/state/        arrays, as Orbax lays them out
                     meta.json     the config, and what a run must know beside its arrays
                     digests.json  size and SHA-256 of every other file
    checkpoints/STEP.orbax-checkpoint-tmp/  being written; after a crash it is incomplete and deleted at the next start
    checkpoints/damaged/STEP-N/    one that was found damaged

Orbax's CheckpointManager copies the arrays to the host, writes them on threads of its own while training goes on,
renames the folder once it is complete, and then deletes what the policy does not keep. Orbax loads a flipped byte
without an error, hence the digests; they are of files, so that finding damage takes no decoding and no device, and
Orbax's own metadata is covered too. Every process of a run calls `save`, `wait` and `load`.

Easy to get wrong: `AtomicRenameTemporaryPath.finalize` writes two files after the last callback, and no digest could
cover them, so `_commit` takes that method's place: it seals the folder, renames it and flushes the rename to the disk.
Orbax deletes an old checkpoint file by file, so a process that dies meanwhile leaves half of it under its name. No run
resumes from that: newer ones are taken first, the digests show the damage, and the next save deletes the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from recollect.configuration import Config, UserError, to_json
from recollect.configuration.io import DiskFull, first_line, is_disk_full, read_json, write_json
from recollect.training.checkpoint.integrity import damage, seal
from recollect.training.distributed.host import current_host

Log = Callable[[str], None]

_UNFINISHED = ("*.orbax-checkpoint-tmp", "*.writing")
"""Folders of saves that were cut off; `.writing` and `.retired` are names of earlier versions."""


class Checkpoints:
    """The checkpoints of one run, in `directory`/STEP.

    Args:
      keep: how many of the newest stay.
      keep_every: the first checkpoint at or after each multiple of so many steps stays too.

    Attributes:
      seconds: how long the last save took, to the rename; 0 before the first one ended.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_every: int | None = None):
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.keep_every = keep_every
        self.seconds = 0.0
        self._orbax: Any = None
        self._pending: int | None = None
        self._meta: dict[str, Any] = {}
        self._begun = 0.0

    def steps(self) -> list[int]:
        """Returns the steps saved and sealed, oldest first; `problem` says whether their files are still whole."""
        names = (path.name for path in self.directory.iterdir()) if self.directory.is_dir() else ()
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, state: Any, config: Config, extra: dict[str, Any]) -> None:
        """Starts to save `state`, the config and JSON-ready `extra`; returns once the arrays are on the host.

        A step that is there already stays as it is. An earlier save that still runs is waited for.

        Raises:
          DiskFull, UserError: this save could not start, or the earlier one failed. What it had written is deleted.
        """
        self.wait()
        if current_host().broadcast(step in self.steps()):
            return
        if jax.default_backend() == "cpu":
            # On a CPU the host's copy is a view of the device's buffer, which the next step is given to write into.
            # `device_put` copies without compiling a program for each shape.
            state = jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), state)
        import orbax.checkpoint as ocp

        self._pending, self._begun = step, time.perf_counter()
        self._meta = {"config": to_json(config), "extra": extra}
        try:
            self._orbax = self._orbax or self._manager()
            self._orbax.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)), force=True)
        except Exception as error:
            if current_host().count == 1:
                self._fail(error)
            raise

    def wait(self) -> None:
        """Returns once the save that was started, if any, is whole on the disk. Every process must call it.

        Raises:
          DiskFull, UserError: it failed; the checkpoints before it are as they were.
        """
        if self._pending is None:
            return
        error: Exception | None = None
        try:
            self._orbax.wait_until_finished()
        except Exception as raised:  # Orbax and TensorStore raise many kinds
            error = raised
        if current_host().largest(int(error is not None)):
            self._fail(error)
        self._pending = None

    def ended(self) -> bool:
        """Returns whether the save that was started has ended, so that `wait` returns or raises at once."""
        return self._pending is not None and not self._orbax.is_saving_in_progress()

    def load(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of a step, every array placed as `abstract` asks, and `extra`. Files are not verified here:
        see `problem`.

        Args:
          abstract: a tree like the state saved, of arrays or ShapeDtypeStructs whose `sharding` says where each goes:
            another mesh, another number of devices or processes than the state was saved from. Without one it goes onto
            the first device.

        Raises:
          UserError: the checkpoint is of another structure, or cannot be read.
        """
        self.wait()
        folder = self.directory / str(step)
        with reading(folder) as reader:
            return restore(reader, folder, abstract), read_json(folder / "meta.json")["extra"]

    def problem(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint's files, or None. The main process reads them all, for every
        process."""
        host = current_host()
        return host.broadcast(damage(self.directory / str(step)) if host.is_main else None)

    def set_aside(self, step: int, problem: str, log: Log) -> None:
        """Moves a damaged checkpoint to damaged/ and logs that."""
        if current_host().is_main:
            folder = self.directory / "damaged"
            folder.mkdir(exist_ok=True)
            number = 1 + sum(path.name.startswith(f"{step}-") for path in folder.iterdir())
            log(f"checkpoint {self.directory / str(step)} is damaged: {problem}; set aside as damaged/{step}-{number}")
            os.rename(self.directory / str(step), folder / f"{step}-{number}")
        self._changed()

    def recover(self, log: Log) -> None:
        """Deletes what a process that died while saving has left, and logs that. To be called before the first save."""
        if current_host().is_main and self.directory.is_dir():
            for path in self.directory.glob("*.retired"):
                shutil.rmtree(path, ignore_errors=True)
            for path in sorted(path for pattern in _UNFINISHED for path in self.directory.glob(pattern)):
                log(f"checkpoint {self.directory / path.stem} was cut off while it was written: incomplete; deleted")
                shutil.rmtree(path, ignore_errors=True)
        self._changed()

    def newest_good(self, log: Log = print, before: int | None = None) -> int | None:
        """Returns the newest step (less than `before`, if given) whose files are whole; None: none was ever saved.

        Damaged ones on the way are named and set aside.

        Raises:
          UserError: there were checkpoints and all are damaged.
        """
        for step in reversed(self.steps()):
            if before is not None and step >= before:
                continue
            problem = self.problem(step)
            if problem is None:
                return step
            self.set_aside(step, problem, log)
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
        if current_host().is_main:
            for later in self.steps():
                if later > step:
                    shutil.rmtree(self.directory / str(later), ignore_errors=True)
        self._changed()

    def close(self) -> None:
        """Waits for a running save; raises as `wait` does."""
        self.wait()
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None

    def _manager(self) -> Any:
        """Returns Orbax's manager of the directory as it is now; `save` returns when the arrays are on the host."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        _quiet()
        policy = policies.AnyPreservationPolicy([policies.LatestN(self.keep), _FirstOfEvery(self.keep_every)])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            temporary_path_class=_committed_by(self._commit, self.directory),
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            lightweight_initialize=True,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options)

    def _commit(self, temporary: Path, final: Path) -> None:
        """Makes a written folder count: in the main process, on a thread of Orbax."""
        write_json(temporary / "meta.json", self._meta)
        seal(temporary)
        os.rename(temporary, final)
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        self.seconds = time.perf_counter() - self._begun

    def _fail(self, error: Exception | None) -> None:
        """Forgets the save that was started, in all processes, and raises why it failed in one of them."""
        step, self._pending, self._orbax = self._pending, None, None
        host = current_host()
        full = host.largest(int(is_disk_full(error)))
        if host.is_main:
            for path in self.directory.glob(f"{step}.*"):
                shutil.rmtree(path, ignore_errors=True)
        steps = self.steps()
        kept = f"the last good one is of step {steps[-1]}" if steps else "there is none before it"
        why = "another process could not write its part" if error is None else first_line(error)
        why, kind = ("no space is left on the disk", DiskFull) if full else (why, UserError)
        raise kind(f"checkpoint {self.directory / str(step)} could not be written: {why}; {kept}") from error

    def _changed(self) -> None:
        """Waits for the main process' changes to the directory, and has Orbax look at it again."""
        current_host().wait_for_all()
        if self._orbax is not None:
            self._orbax.reload()


class _FirstOfEvery:
    """Orbax's policy for the first checkpoint at or after each multiple of `interval` steps (None: of none)."""

    def __init__(self, interval: int | None):
        self.interval = interval

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        if self.interval is None:
            return [False] * len(checkpoints)
        multiples = [info.step // self.interval for info in checkpoints]
        return [multiple > before for before, multiple in zip([0, *multiples], multiples, strict=False)]


def _committed_by(commit: Callable[[Path, Path], None], directory: Path) -> Any:
    """Returns Orbax's class of a folder that is renamed once it is written; in `directory`, `commit` does that."""
    from orbax.checkpoint.path import atomicity

    class Sealed(atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            final = Path(self.get_final())
            if final.parent != directory:  # state/ of a step, which has a temporary name of its own
                return await super().finalize()
            if self._checkpoint_metadata_store is not None:
                await asyncio.to_thread(self._checkpoint_metadata_store.wait_until_finished)
            await asyncio.to_thread(commit, Path(self.get()), final)

    return Sealed


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[Any]:
    """Yields Orbax's reader of a checkpoint; whatever is raised meanwhile becomes a UserError that names the folder."""
    import orbax.checkpoint as ocp

    _quiet()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            yield reader
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise UserError(f"checkpoint {folder} cannot be read: {first_line(error)}") from error


def restore(reader: Any, folder: Path, abstract: Any, *, partial: bool = False) -> Any:
    """Returns the arrays of a checkpoint's state that `abstract` names (`partial`: not all of them), placed by its
    shardings; those without one go onto the first device."""
    import orbax.checkpoint as ocp

    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        sharding = sharding if isinstance(sharding, jax.sharding.Sharding) else first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.tree.map(placed, abstract)
    arguments = ocp.checkpoint_utils.construct_restore_args(shapes)
    request = ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=partial)
    return reader.restore(folder / "state", args=request)


def _quiet() -> None:
    """Silences Orbax, which logs every file it touches, and what its threads log of errors that `wait` raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
