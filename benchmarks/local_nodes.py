"""A Ray cluster of several nodes on this machine: a `ray start` process for each, with resources of its own.

Where the machine lets this process make network namespaces (Linux, root, the command `ip`), each node gets one: it has
an address of its own and reaches the others over a bridge alone, as machines would. Else all share the loopback
interface. `LocalNodes.where` says which.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

START_SECONDS = 120.0
HIGHEST_HEAD_PORT = 10_001  # Ray's workers take those above
NETWORK = "10.213.7"  # of the bridge, inside the namespaces only


class LocalNodes:
    """Nodes that trust one token; the first is the head.

    Args:
        cpus: of each node.
        namespaces: whether each is to have a network namespace; None where that is possible.
        dashboard: whether the head takes jobs.

    Attributes:
        address: of the head.
        jobs: address that takes jobs, for processes started by `command`.
        environment: of processes that connect to it.
        where: how the nodes are connected, in words.
    """

    def __init__(self, cpus: Sequence[float], *, namespaces: bool | None = None, dashboard: bool = False) -> None:
        self.folder = tempfile.mkdtemp(prefix="nodes-")
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment |= {"RAY_worker_niceness": "0", "RAY_health_check_period_ms": "1000"}
        programs = str(Path(sys.executable).parent)
        self.environment["PATH"] = os.pathsep.join([programs, self.environment.get("PATH", "")])  # where jobs look
        self.apart = can_make_namespaces() if namespaces is None else namespaces
        self.where = "in network namespaces" if self.apart else "on the loopback interface"
        self.name = f"gream-{os.getpid()}"
        self.nodes: list[tuple[int, subprocess.Popen[bytes]]] = []
        self.numbers = itertools.count()
        head_host, port = (f"{NETWORK}.1" if self.apart else "127.0.0.1"), _free_port()
        dashboard_port = _free_port()
        self.address, self.jobs = f"{head_host}:{port}", f"http://127.0.0.1:{dashboard_port}"
        try:
            self._start(
                cpus[0],
                ["--head", f"--port={port}", f"--include-dashboard={dashboard}".lower(),
                 f"--dashboard-port={dashboard_port}"],
            )  # fmt: skip
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
        made, node = self.nodes.pop(number)
        for process in psutil.Process(node.pid).children(recursive=True):
            if process.name() == "raylet":
                process.send_signal(signal.SIGKILL)
        self._end(made, node)

    def command(self, *command: str | os.PathLike[str]) -> list[str]:
        """The command as it has to be given to run beside the head."""
        inside = ["ip", "netns", "exec", f"{self.name}-0"] if self.apart else []
        return [*inside, *map(str, command)]

    def processes(self, name: str) -> list[psutil.Process]:
        """Processes of the nodes whose name begins so, the youngest last."""
        found = []
        for _, node in self.nodes:
            for process in psutil.Process(node.pid).children(recursive=True):
                try:
                    if process.name().startswith(name):
                        found.append((process.create_time(), process))
                except psutil.NoSuchProcess:
                    continue
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def __enter__(self) -> LocalNodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all nodes, the head last."""
        while self.nodes:
            self._end(*self.nodes.pop())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, cpus: float, arguments: list[str]) -> None:
        number = next(self.numbers)
        host = f"{NETWORK}.{number + 1}" if self.apart else "127.0.0.1"
        inside: list[str] = []
        if self.apart:
            self._connect(number, host)
            inside = ["ip", "netns", "exec", f"{self.name}-{number}"]
        command = [
            *inside, str(Path(sys.executable).with_name("ray")), "start", "--block", f"--num-cpus={cpus:g}", *arguments,
            # As on machines, each has a folder of its own: a node that comes unpacks a job's files, and where another
            # had them already, its actors would lose their working directory.
            f"--temp-dir={self.folder}/{number}", f"--node-ip-address={host}", "--disable-usage-stats",
            f"--object-store-memory={256 * 2**20}",
        ]  # fmt: skip
        log = Path(self.folder) / f"start-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            node = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.nodes.append((number, node))
        deadline = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a node did not start: {log.read_text()}")
            time.sleep(0.1)

    def _connect(self, number: int, host: str) -> None:
        """Make the namespace of a node; the bridge is in that of the head, so nothing shows outside."""
        mine, head = f"{self.name}-{number}", f"{self.name}-0"
        _ip("netns", "add", mine)
        _ip("-n", mine, "link", "set", "lo", "up")
        if number == 0:
            _ip("-n", mine, "link", "add", "nodes", "type", "bridge")
            device = "nodes"
        else:
            device, peer = "node", f"node-{number}"
            _ip("link", "add", device, "netns", mine, "type", "veth", "peer", "name", peer, "netns", head)
            _ip("-n", head, "link", "set", peer, "master", "nodes", "up")
        _ip("-n", mine, "addr", "add", f"{host}/24", "dev", device)
        _ip("-n", mine, "link", "set", device, "up")

    def _end(self, number: int, node: subprocess.Popen[bytes]) -> None:
        """End a node's processes: those that it started are in its session, or their parent is gone."""
        family = [*psutil.Process(node.pid).children(recursive=True)] if node.poll() is None else []
        for process in (*family, node):
            if psutil.pid_exists(process.pid):
                os.kill(process.pid, signal.SIGKILL)
        node.wait(timeout=60)
        psutil.wait_procs(family, timeout=60)
        if self.apart:
            _ip("netns", "del", f"{self.name}-{number}")


def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces and connect them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"gream-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if not made:
        return False
    bridge = subprocess.run(["ip", "-n", name, "link", "add", "nodes", "type", "bridge"], capture_output=True)
    _ip("netns", "del", name)
    return bridge.returncode == 0


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _free_port() -> int:
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        port = 1024 + port % (HIGHEST_HEAD_PORT - 1024)
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)):
                return port
