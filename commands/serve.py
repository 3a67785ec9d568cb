"""Serves a text model to tools that speak OpenAI's completions protocol, on this machine alone."""

from __future__ import annotations

import argparse
import socket

from recollect.commands import add_overrides, add_with
from recollect.commands.user_code import load_files
from recollect.configuration.base import UserError
from recollect.configuration.console import doing
from recollect.configuration.user_paths import path

HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_with(parser)
    parser.add_argument(
        "run", type=path, help="a run's folder (RUN:500: its step 500), an export, a Hugging Face folder"
    )
    parser.add_argument("--port", type=int, default=8000, help="of the loopback address 127.0.0.1 (default: 8000)")
    parser.add_argument("--rows", type=int, default=8, help="continuations at once (default: 8)")
    parser.add_argument(
        "--context", type=int, default=2048, help="most tokens of a prompt and its continuation (default: 2048)"
    )
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait for a row (default: 64)")
    add_overrides(parser, "model.dtype=bfloat16")


def run(options: argparse.Namespace) -> int:
    """Runs the command until it is interrupted; returns its exit code."""
    from recollect.training.checkpoint.load import open_text_run

    try:
        import uvicorn

        from recollect.serving import Batcher, application
    except ImportError as error:
        raise UserError(f"serve needs starlette and uvicorn (pip install starlette uvicorn): {error}") from None
    if not 0 < options.port < 2**16:
        raise UserError(f"--port {options.port}: must be between 1 and 65535")
    for flag, value, least in (
        ("rows", options.rows, 1),
        ("context", options.context, 2),
        ("waiting", options.waiting, 1),
    ):
        if value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    listener = _listener(options.port)
    load_files(options, options.run)
    model, params, tokenizer = open_text_run(options.run, options.overrides)
    name = options.run.resolve().name
    sizes = {"rows": options.rows, "context": options.context, "waiting": options.waiting}
    batcher = Batcher(model, params, tokenizer, **sizes)
    print("compiling", flush=True)
    batcher.start()
    print(
        f"serving {name} at http://{HOST}:{options.port}/v1 ({batcher.context} tokens, {options.rows} rows)", flush=True
    )
    doing("")
    try:
        uvicorn.Server(uvicorn.Config(application(batcher, name), log_level="warning")).run(sockets=[listener])
    finally:
        batcher.close()
    return 0


def _listener(port: int) -> socket.socket:
    """Returns a socket that holds the port, taken before the model is compiled.

    Raises:
      UserError: the port is taken, or not this user's to take.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise UserError(f"--port {port}: {error.strerror}; another one may be free") from None
    return listener
