"""Real processes over loopback, for tests: started together, watched, and asked how they ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.quick_compilation import XLA_FLAGS

PROJECT = Path(__file__).resolve().parents[3]


class Together:
    """`count` processes of one command line, each with `devices` fake devices; their output goes to files in `folder`.

    Args:
      command: what python is to run, before --coordinator, --processes and --process.
    """

    def __init__(
        self,
        folder: Path,
        command: list[str],
        count: int = 2,
        devices: int = 1,
        only: tuple[int, ...] | None = None,
        **variables,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.address = f"127.0.0.1:{free_port()}"
        flags = f"--xla_force_host_platform_device_count={devices} {XLA_FLAGS}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(PROJECT),
            "RECOLLECT_PEER_TIMEOUT": "4",
            "RECOLLECT_START_TIMEOUT": "120",
            **variables,
        }
        self.files = [folder / f"output-{index}" for index in range(count)]
        self.processes = {}
        for index in range(count) if only is None else only:
            arguments = [*command, "--coordinator", self.address, "--processes", str(count), "--process", str(index)]
            with self.files[index].open("w") as file:
                self.processes[index] = subprocess.Popen(
                    [sys.executable, *arguments], cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT
                )

    def output(self, index: int) -> str:
        return self.files[index].read_text()

    def until(self, text: str, index: int = 0, seconds: float = 120) -> None:
        """Waits until a process has printed `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.output(index):
            assert self.processes[index].poll() is None, self.output(index)[-3000:]
            assert time.monotonic() < deadline, f"process {index} never printed {text!r}: {self.output(index)[-3000:]}"
            time.sleep(0.05)

    def send(self, index: int, number: int) -> None:
        self.processes[index].send_signal(number)

    def codes(self, seconds: float = 120) -> dict[int, int]:
        """Exit codes, once all have ended; past `seconds` they are killed and the test fails."""
        deadline = time.monotonic() + seconds
        try:
            return {
                index: process.wait(max(0.1, deadline - time.monotonic())) for index, process in self.processes.items()
            }
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]
