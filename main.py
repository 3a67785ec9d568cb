"""The command line. A command's module is imported when it is asked for, so that `list` and errors answer at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from recollect import __version__, starting
from recollect.configuration.console import exit_code, lasting_output

COMMANDS = {
    "list": "names of all experiments and studies",
    "describe": "parameters, FLOPs, state bytes and a compile check, without data",
    "train": "train one experiment; the same command resumes it",
    "compare": "train what a study lacks, then table and plots; or those of runs that exist",
    "report": "write one HTML page about a study or some runs",
    "diagnose": "norms, examples and errors by distance of a run, and what may help it",
    "check": "hold mixers in a file of yours to the laws of all mixers",
    "new": "write a file to start from: a mixer, a task or a study",
    "evaluate": "evaluate a run's newest checkpoint",
    "generate": "continue a prompt with a text model",
    "serve": "serve a text model as an OpenAI-compatible endpoint on this machine",
    "replay": "run a step again that was not finite, and name the layer that broke first",
    "export": "write a run's newest checkpoint for other programs",
    "import": "read a Hugging Face folder into an export of this project",
    "prepare": "tokenise a text source once, into a folder that training reads",
    "inspect": "first documents or examples of a data set, lengths, unknown tokens, splits",
    "bench": "time this project's parts, beside peers where they can be had",
}
"""What each command does; `recollect.commands.NAME` holds it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 2 for a user's mistake, 3 for a diverged run, 130 for a stopped one."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(arguments[0] if arguments else "")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        options.overrides = rest
    elif rest and (any(argument.startswith("-") for argument in rest) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:
        options.overrides += rest  # argparse gives up on trailing positionals that an option separates
    with lasting_output(options.command) as output:
        return output.checked(
            exit_code(lambda: importlib.import_module(f"recollect.commands.{options.command}").run(options))
        )


class _Parser(argparse.ArgumentParser):
    """argparse with this project's error line."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (see `{starting.PROGRAM} --help`)\n")


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line; of the commands, `chosen` alone has its options."""
    text = "Efficient attention architectures: recall, state size, speed, pretraining, export."
    parser = _Parser(prog=starting.PROGRAM, description=text)
    parser.add_argument("--version", action="version", version=f"recollect {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="command")
    for name, text in COMMANDS.items():
        # The options of `bench NAME` are the benchmark's own, `--help` too.
        command = commands.add_parser(name, help=text, description=text, add_help=name != "bench")
        if name == chosen:
            importlib.import_module(f"recollect.commands.{name}").add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
