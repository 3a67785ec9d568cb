"""Runs the laws of the mixer contract on mixers of the user's, and prints which hold."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

DEVICES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("mixers", metavar="FILE.py[:MIXER]", help="mixer configs: instances, or classes with defaults")
    text = "only this law, by name or number (it may be repeated)"
    parser.add_argument("--law", dest="laws", action="append", default=[], metavar="LAW", help=text)


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code, 1 where a law does not hold."""
    # Read when jax is imported: laws are about arithmetic on CPUs, one of them about eight devices.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's compiler warns about splits over the eight devices
    from recollect.commands.user_code import load_mixers

    laws = _chosen(options.laws)
    mixers = load_mixers(options.mixers)
    return 1 if sum(_check(name, mixer, laws) for name, mixer in mixers.items()) else 0


def _chosen(asked: list[str]) -> dict[str, Callable[[Any], None]]:
    """Returns the laws that were asked for, by name or number; without any, all."""
    from recollect.configuration import UserError
    from recollect.configuration.names import nearest

    laws = all_laws()
    for one in asked:
        if not any(one in (law, law.split("_")[1]) for law in laws):
            raise UserError(f"--law {one}: there is none{nearest(one, laws)}; there are {', '.join(laws)}")
    return {law: function for law, function in laws.items() if not asked or {law, law.split("_")[1]} & {*asked}}


def _check(name: str, config: Any, laws: dict[str, Callable[[Any], None]]) -> int:
    """Prints which laws hold for a mixer; returns how many do not."""
    import jax

    from recollect.configuration import UserError
    from recollect.configuration.field_docs import first_sentence
    from recollect.configuration.python_files import errors_named, file_of
    from recollect.layers.laws import WIDTH, Subject, not_asked
    from recollect.layers.mixer_outputs import check_outputs

    print(f"{name}: {config}")
    file = file_of(type(config))
    try:
        check_outputs(config, WIDTH)
        with errors_named(file):
            subject = Subject(config, name)
    except UserError as error:
        raise UserError(f"{name} cannot be checked: {error} (laws build a mixer at width {WIDTH})") from error
    counts = {"hold": 0, "skipped": 0, "FAIL": 0}
    begun = time.perf_counter()
    for law, function in laws.items():
        said = not_asked(law, config.traits)
        if law == "law_8_sharded" and jax.device_count() < DEVICES:
            said = f"takes {DEVICES} devices, and here there are {jax.device_count()} (XLA_FLAGS)"
        outcome = "skipped" if said else "hold"
        try:
            with errors_named(file):
                if not said:
                    function(subject)
        except (AssertionError, UserError) as error:
            outcome = "FAIL"
            cause = error.__cause__ if isinstance(error.__cause__, AssertionError) else error
            said = f"{first_sentence(function.__doc__ or '')}. {' '.join(str(cause).split())}"
        counts[outcome] += 1
        shown = {"hold": "holds", "FAIL": "FAILS"}.get(outcome, outcome)
        print(f"  {shown:8} {law}{f': {said}' if said else ''}", flush=True)
    counted = ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items())
    print(f"  {counted} ({time.perf_counter() - begun:.0f} s)")
    return counts["FAIL"]


def all_laws() -> dict[str, Callable[[Any], None]]:
    """Returns the laws that a mixer is held to by name, in the order of their numbers: each takes a
    `layers.laws.Subject`, and raises AssertionError where it does not hold."""
    from recollect.export import laws as exported
    from recollect.layers import laws as alone
    from recollect.training import laws as trained

    laws = {**alone.LAWS, **trained.LAWS, **exported.LAWS}
    return dict(sorted(laws.items(), key=lambda item: int(item[0].split("_")[1])))
