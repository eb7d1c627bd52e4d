"""A Ray cluster of several nodes on this machine: a `ray start` process for each, with resources of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil

START_SECONDS = 120.0
HIGHEST_HEAD_PORT = 10_001  # Ray's workers take those above


class LocalNodes:
    """Nodes on the loopback interface that trust one token; the first is the head.

    Attributes:
        address: of the head.
        environment: of processes that connect to it.
    """

    def __init__(self, cpus: list[float]) -> None:
        self.folder = tempfile.mkdtemp(prefix="nodes-")
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment |= {"RAY_worker_niceness": "0", "RAY_health_check_period_ms": "1000"}
        port = _free_port()
        self.address = f"127.0.0.1:{port}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        try:
            head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
            self._start(cpus[0], head)
            for count in cpus[1:]:
                self.add(count)
        except BaseException:
            self.close()
            raise

    def add(self, cpus: float) -> None:
        """Start one more node, and wait until the head knows it."""
        self._start(cpus, [f"--address={self.address}"])

    def lose(self, number: int) -> None:
        """Kill the raylet of a node by SIGKILL, which takes its workers along, and forget the node."""
        node = self.nodes.pop(number)
        for process in psutil.Process(node.pid).children(recursive=True):
            if process.name() == "raylet":
                process.send_signal(signal.SIGKILL)
        _end(node)

    def __enter__(self) -> LocalNodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all nodes, the head last."""
        while self.nodes:
            _end(self.nodes.pop())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, cpus: float, arguments: list[str]) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", f"--num-cpus={cpus:g}", *arguments,
            "--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--object-store-memory={256 * 2**20}",
        ]  # fmt: skip
        log = Path(self.folder) / f"start-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            node = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.nodes.append(node)
        deadline = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a node did not start: {log.read_text()}")
            time.sleep(0.1)


def _end(node: subprocess.Popen[bytes]) -> None:
    """End a node's processes: those that it started are in its session, or their parent is gone."""
    family = [*psutil.Process(node.pid).children(recursive=True)] if node.poll() is None else []
    for process in (*family, node):
        if psutil.pid_exists(process.pid):
            os.kill(process.pid, signal.SIGKILL)
    node.wait(timeout=60)
    psutil.wait_procs(family, timeout=60)


def _free_port() -> int:
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        port = 1024 + port % (HIGHEST_HEAD_PORT - 1024)
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)):
                return port
