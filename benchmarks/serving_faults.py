"""The service through faults, under load, for some minutes: what its clients got, and how its memory grew.

    python -m benchmarks.serving_faults runs/ml-100k --minutes 10

Beside clients that ask both modes go others: some send what schemathesis makes of the OpenAPI document, or bodies
that are malformed, too large or too slow, or wrong keys, and some leave while their stream is written. In the first
third a replica of each mode is killed (kill -9) and the checkpoint is swapped, twice. An answer is *wrong* where it
holds what is no item or an item twice, and a direct one where more than one item differs from the first list of its
version for the same user: the last place may turn on rounding. Memory is compared between half time and the end.
The exit status is 1 where a well-formed request failed or got a wrong answer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import safetensors.torch
import typer
from rich.table import Table

from benchmarks.serving_subjects import START_SECONDS, STOP_SECONDS, free_port, gream_serve, wait_until_ready
from cluster.progress import console
from curriculum.corpus import load_corpus

KEY = {"Authorization": "Bearer right"}
JSON = KEY | {"Content-Type": "application/json"}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Clients:
    """Threads that ask until `ended`, and what they got: answers by kind of client and status.

    Attributes:
        wrong: lists that hold what is no item, or that are not those of their version.
    """

    def __init__(self, url: str, users: list[Any], items: set[Any]) -> None:
        self.url, self.users, self.items = url, users, items
        self.ended = threading.Event()
        self.got: Counter[tuple[str, str]] = Counter()
        self.wrong, self.expected = 0, dict[tuple[str, Any], list[Any]]()
        self.lock = threading.Lock()

    def note(self, kind: str, status: int | str) -> None:
        with self.lock:
            self.got[kind, str(status)] += 1

    def ask(self, mode: str) -> None:
        """Well-formed requests, whose answers are looked at."""
        with httpx.Client(base_url=self.url, headers=KEY, timeout=120) as client:
            for user in itertools.cycle(self.users):
                if self.ended.is_set():
                    return
                try:
                    answer = client.post("/v1/recommend", json={"user_id": user, "mode": mode, "chains": 2})
                except httpx.TransportError as error:
                    self.note(mode, type(error).__name__)
                    continue
                self.note(mode, answer.status_code)
                if answer.status_code == 200:
                    self.look_at(user, mode, answer.json())

    def look_at(self, user: Any, mode: str, answer: dict[str, Any]) -> None:
        listed = [item["item_id"] for item in answer["items"]]
        with self.lock:
            if mode == "direct":
                first = self.expected.setdefault((answer["versions"]["checkpoint"], user), listed)
                # Places within rounding of each other may change with the batch, so the set counts.
                self.wrong += len(set(first) ^ set(listed)) > 2
            self.wrong += not set(listed) <= self.items or len(set(listed)) < len(listed)

    def disturb(self, kind: str, send: Callable[[httpx.Client], int | str]) -> None:
        """Requests that are not to be answered with items."""
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.ended.is_set():
                try:
                    self.note(kind, send(client))
                except httpx.TransportError as error:
                    self.note(kind, type(error).__name__)
                time.sleep(0.05)

    def malformed(self, client: httpx.Client) -> int:
        return client.post("/v1/recommend", content=b"[" * 5000, headers=JSON).status_code

    def oversized(self, client: httpx.Client) -> int:
        return client.post("/v1/recommend", content=b"1" * 2**20, headers=JSON).status_code

    def wrong_key(self, client: httpx.Client) -> int:
        headers = {"Authorization": "Bearer wrong"}
        return client.post("/v1/recommend", json={"user_id": 1}, headers=headers).status_code

    def slow(self, client: httpx.Client) -> str:
        """A body that never comes whole: the status line."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            head = "POST /v1/recommend HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\nContent-Length: 9\r\n\r\n{"
            connection.sendall(head.encode())
            return connection.recv(4096).split(b" ")[1].decode()

    def leaving(self, client: httpx.Client) -> str:
        """A stream that is left after its first event."""
        body = {"user_id": self.users[0], "mode": "reasoning", "chains": 8, "stream": True}
        with client.stream("POST", "/v1/recommend", json=body, headers=KEY) as answer:
            next(answer.iter_lines(), "")
            return f"{answer.status_code}, left"

    def generated(self, cases: int) -> None:
        """Requests of schemathesis, fitting and not, `cases` at least: some operations have few different ones."""
        import hypothesis
        import schemathesis

        schema = schemathesis.openapi.from_url(f"{self.url}/openapi.json", headers=KEY)
        found: Any = schema.get_all_operations()
        operations = [one.ok() for one in found]
        each = -(-cases // (2 * len(operations)))
        settings = hypothesis.settings(
            max_examples=each, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        while sum(count for (client, _), count in list(self.got.items()) if client == "schemathesis") < cases:
            for operation, kind in itertools.product(operations, schemathesis.GenerationMode):
                if kind == schemathesis.GenerationMode.NEGATIVE and not [*operation.iter_parameters(), *operation.body]:
                    continue  # there is nothing that could not fit

                @settings
                @hypothesis.given(case=operation.as_strategy(generation_mode=kind))
                def send(case: Any) -> None:
                    self.note("schemathesis", case.call(headers=KEY, timeout=120).status_code)

                send()


@app.command()
def faults(
    run: Annotated[Path, typer.Argument(help="Run folder; it is copied.")],
    stage: Annotated[str, typer.Option(help="Stage whose checkpoint is served: train or sft.")] = "train",
    minutes: Annotated[float, typer.Option(min=0.5)] = 10.0,
    cases: Annotated[int, typer.Option(min=1, help="Requests of schemathesis.")] = 2000,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each model.")] = 1,
) -> None:
    """Serve a run through faults."""
    corpus = load_corpus(run / "corpus", run / "index")
    users, items = list(corpus.sequences.user_ids[:64]), set(corpus.catalogue.item_ids)
    os.environ["BENCHMARK_KEYS"] = "right"
    with tempfile.TemporaryDirectory() as root:
        served = Path(root) / "run"
        for part in ("index", "corpus", f"{stage}/checkpoint"):
            shutil.copytree(run / part, served / part)
        shutil.copy(run / "settings.yaml", served)
        port = free_port()
        more = ["serving.key_variable=BENCHMARK_KEYS", "serving.body_seconds=5"]
        process = gream_serve(served, stage, port, threads, more, Path(root) / "log")
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", Path(root) / "log", START_SECONDS)
            clients = Clients(f"http://127.0.0.1:{port}", users, items)
            memory = under_load(clients, process.pid, served / stage / "checkpoint", 60 * minutes, cases)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=STOP_SECONDS)
    report(clients, memory)
    well_formed = {status for (kind, status), _ in clients.got.items() if kind in ("direct", "reasoning")}
    raise typer.Exit(1 if clients.wrong or well_formed - {"200", "429", "503"} else 0)


def under_load(
    clients: Clients, pid: int, checkpoint: Path, seconds: float, cases: int
) -> dict[str, tuple[float, float]]:
    """Run all clients and faults; MiB of each process after the last fault and at the end."""
    started = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        asking = [pool.submit(clients.ask, mode) for mode in ("direct", "direct", "reasoning")]
        asking += [
            pool.submit(clients.disturb, kind, send)
            for kind, send in (
                ("malformed", clients.malformed), ("oversized", clients.oversized), ("wrong key", clients.wrong_key),
                ("slow", clients.slow), ("leaving", clients.leaving),
            )
        ]  # fmt: skip
        asking.append(pool.submit(clients.generated, cases))
        try:
            for number, fault in enumerate((kill("Direct"), swap(checkpoint), kill("Reasoning"), swap(checkpoint))):
                _sleep_until(started + seconds * (number + 1) / 15)
                fault(pid)
            _sleep_until(started + seconds * 0.5)
            before = memory_of(pid)
            _sleep_until(started + seconds)
            after = memory_of(pid)
        finally:
            clients.ended.set()
        for one in asking:
            one.result()
    return {name: (before[name], after[name]) for name in sorted(before) if name in after}


def kill(name: str) -> Callable[[int], None]:
    """Kills a replica of a mode."""

    def fault(pid: int) -> None:
        replicas = [child for child, full in serve_processes(pid).items() if f":{name}Recommender" in full]
        os.kill(replicas[0], signal.SIGKILL)

    return fault


def swap(checkpoint: Path) -> Callable[[int], None]:
    """Writes other weights of the same shape, and has the service take them up."""

    def fault(pid: int) -> None:
        file = checkpoint / "model.safetensors"
        changed = {name: 0.99 * weight for name, weight in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(changed, f"{file}.new", metadata={"format": "pt"})
        os.replace(f"{file}.new", file)
        os.kill(pid, signal.SIGHUP)

    return fault


def serve_processes(pid: int) -> dict[int, str]:
    """Proxy and replicas below a process: what Ray calls them, by process id."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        try:
            name = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "ServeReplica" in name or "ProxyActor" in name:
            found[child.pid] = name.split(".")[0].strip().removeprefix("ray::")
    return found


def memory_of(pid: int) -> dict[str, float]:
    """MiB of each process by name and id, without what it shares."""
    memory = {}
    for child, name in serve_processes(pid).items():
        with contextlib.suppress(psutil.NoSuchProcess):  # a replica of the version before, that has ended meanwhile
            memory[f"{name} {child}"] = psutil.Process(child).memory_full_info().uss / 2**20
    return memory


def report(clients: Clients, memory: dict[str, tuple[float, float]]) -> None:
    """Print what the clients got and how memory grew."""
    table = Table("clients", "answer", "requests")
    for (kind, status), count in sorted(clients.got.items()):
        table.add_row(kind, status, str(count))
    console.print(table)
    console.print(f"wrong answers: {clients.wrong}", highlight=False)
    table = Table("process", "MiB after the faults", "MiB at the end")
    for name, (before, after) in memory.items():
        table.add_row(name, f"{before:.0f}", f"{after:.0f}")
    console.print(table)


def _sleep_until(when: float) -> None:
    time.sleep(max(0.0, when - time.monotonic()))


if __name__ == "__main__":
    app()
