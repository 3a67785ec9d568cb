"""Two services of jax around a run: a trace of some of its steps, and a folder that keeps compiled programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax

from recollect.configuration import UserError


def parse_window(text: str) -> tuple[int, int]:
    """ "10:15" to (10, 15): the steps after step 10, up to step 15.

    Raises:
      UserError: it is no such pair, or an empty one.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(
            f"run.profile={text!r}: the form is FIRST:LAST, for example 10:15 for the steps after step 10 up to step 15"
        )
    return int(found[1]), int(found[2])


class Profile:
    """Traces the device calls that hold steps of the window; written to FOLDER, for xprof (or TensorBoard with its
    profile plugin).

    Call `before` and `after` around every device call; `close` at the end of the run, however it ends.
    """

    def __init__(self, window: str | None, folder: Path, say: Callable[[str], None]):
        self.window = None if window is None else parse_window(window)
        self.folder = Path(folder)
        self.say = say
        self.first: int | None = None

    def before(self, step: int, steps: int) -> None:
        """Before a call of `steps` steps that begins after step `step`."""
        if self.window is None or self.first is not None:
            return
        begin, end = self.window
        if step < end and step + steps > begin:
            jax.profiler.start_trace(str(self.folder))
            self.first = step

    def after(self, step: int) -> None:
        """After that call, whose results have arrived; `step` steps are done."""
        if self.first is not None and self.window is not None and step >= self.window[1]:
            self._stop(f"steps {self.first + 1} to {step}")

    def close(self) -> None:
        """Ends a trace that the run did not get to the end of."""
        if self.first is not None and self.window is not None:
            self._stop(f"steps from {self.first + 1} on")

    def _stop(self, what: str) -> None:
        jax.profiler.stop_trace()
        self.window = None
        self.say(
            f"  trace of {what}: {self.folder}; to look at it: pip install xprof, then xprof --port 8791 {self.folder}"
        )


def keep_compiled_programs(folder: str | None) -> Path | None:
    """Tells jax where to keep compiled programs, before the first is compiled.

    Args:
      folder: `run.compile_cache`: a folder, "off", or None: compiled/ in the cache folder on GPUs and TPUs, none on a
        CPU (a program compiled there may hold instructions that another machine with the same home folder lacks, and it
        compiles in seconds). What JAX_COMPILATION_CACHE_DIR says goes before None.

    Returns:
      the folder in use, or None.

    Raises:
      UserError: the folder cannot be made.
    """
    before: str | None = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - which type checkers do not know
    chosen = folder
    if folder is None:
        chosen = before
        if chosen is None and jax.default_backend() != "cpu":
            from recollect.configuration.paths import cache_folder

            chosen = str(cache_folder() / "compiled")
    elif folder == "off":
        chosen = None
    if chosen is not None and "://" not in chosen:
        try:
            Path(chosen).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.compile_cache={chosen}: the folder cannot be made ({error.strerror})") from error
        chosen = str(Path(chosen).expanduser())
    if chosen != before:
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", chosen)
        compilation_cache.reset_cache()  # jax looks at the folder once, at its first compilation
    return None if chosen is None else Path(chosen)
