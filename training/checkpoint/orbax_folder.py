"""Checkpoints of a run: Orbax writes, renames and retires them; SHA-256 digests prove that they are whole.

    checkpoints/STEP/state/        arrays, as Orbax lays them out
                     meta.json     the config, and what a run must know beside its arrays; of text data.json too
                     digests.json  size and SHA-256 of every other file
    checkpoints/STEP.orbax-checkpoint-tmp/  being written; after a crash it is incomplete and deleted at the next start
    checkpoints/damaged/STEP-N/    one that was found damaged

Orbax's CheckpointManager copies the arrays to the host, writes them on threads of its own while training goes on,
renames the folder once it is complete, and then deletes what the policy does not keep. It loads a flipped byte without
an error, hence the digests, of files, so that finding damage takes no decoding and no device. Every process of a run
calls `save` and `wait`. What an earlier process left is checked and loaded in resume.py.

Easy to get wrong: `AtomicRenameTemporaryPath.finalize` writes two files after the last callback, and no digest could
cover them, so `_commit` takes that method's place: it seals the folder, renames it and flushes the rename to the disk.
Orbax deletes an old checkpoint file by file, so a process that dies meanwhile leaves half of it under its name. No run
resumes from that: newer ones are taken first, the digests show the damage, and the next save deletes the rest.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from recollect.configuration import Config, to_json
from recollect.configuration.io import file_sha256, write_json
from recollect.training.distributed.host import current_host

DIGESTS = "digests.json"
"""The file of a sealed folder that lists its other files: {"sha256": {name: [bytes, digest]}}."""


class Checkpoints:
    """The checkpoints of one run, in `directory`/STEP. The newest `keep` stay, and the first one at or after each
    multiple of `keep_every` steps. `seconds` is how long the last save took, to the rename; 0 before the first ended.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_every: int | None = None):
        self.directory = Path(directory).absolute()
        self.keep = keep
        self.keep_every = keep_every
        self.seconds = 0.0
        self._orbax: Any = None
        self._pending: int | None = None
        self._saved: tuple[Any, dict[str, Any]] = (None, {})
        self._begun = 0.0

    def steps(self) -> list[int]:
        """Returns the steps saved and sealed, oldest first; `resume.problem` says whether they are still whole."""
        names = (path.name for path in self.directory.iterdir()) if self.directory.is_dir() else ()
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, state: Any, config: Config, extra: dict[str, Any]) -> None:
        """Starts to save `state`, the config and JSON-ready `extra`; returns once the arrays are on the host. A step
        that is there already stays as it is. An earlier save that still runs is waited for.

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
        self._saved = (config, extra)
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

        quiet()
        policy: Any = policies.LatestN(self.keep)
        if self.keep_every is not None:
            from recollect.training.checkpoint.retention import FirstOfEvery

            policy = policies.AnyPreservationPolicy([policy, FirstOfEvery(self.keep_every)])
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
        config, extra = self._saved
        write_json(temporary / "meta.json", {"config": to_json(config), "extra": extra})
        if not config.data.made_on_device:  # else the config says it all
            from recollect.training.checkpoint.saved_data import write_data

            write_data(temporary, config.data)
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
        from recollect.training.checkpoint.failed_save import failure_of

        step, self._pending, self._orbax = self._pending, None, None
        raise failure_of(self, step, error) from error

    def changed(self) -> None:
        """Waits for the main process' changes to the directory, and has Orbax look at it again."""
        current_host().wait_for_all()
        if self._orbax is not None:
            self._orbax.reload()


def seal(folder: Path) -> None:
    """Writes size and SHA-256 of every file below `folder` into its digests.json, last, after flushing the files to
    the disk."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in names:
        # What another process wrote on a shared disk is flushed too: the page cache is the file's, not the writer's.
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / DIGESTS, {"sha256": digests_of(folder, names)})


def digests_of(folder: Path, names: list[str]) -> dict[str, tuple[int, str]]:
    """Returns size and SHA-256 of each of these files."""
    # hashlib lets other threads run; four read a large checkpoint about four times as fast.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: file_sha256(folder / name), names)
        return {name: ((folder / name).stat().st_size, digest) for name, digest in zip(names, digests, strict=True)}


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


def quiet() -> None:
    """Silences Orbax, which logs every file it touches, and what its threads log of errors that `wait` raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
