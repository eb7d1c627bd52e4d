"""What `benchmarks.serving` compares: each an HTTP server in processes of its own, its requests, and how to read its
answers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.rollout import CPU_BLOCK_TOKENS, ENVIRONMENT
from benchmarks.load import Request
from cluster.pipeline import EVALUATED_STAGES
from cluster.prompts import PromptSource
from curriculum.corpus import Corpus
from item_index.semantic_ids import SemanticIdIndex

OURS, HUGGING_FACE, VLLM = "ours", "Hugging Face, FastAPI", "vLLM, regex"
START_SECONDS, STOP_SECONDS = 600.0, 120.0


@dataclass(frozen=True)
class Case:
    """What all subjects serve and are asked.

    Attributes:
        run, checkpoint: run folder and the checkpoint in it.
        k: items of a list; beams of both beam searches, samples of vLLM's.
        users: test users whose histories are asked about, one after the other.
        batch: requests of one beam search at most.
        chains: of a request of reasoning mode.
    """

    run: Path
    checkpoint: Path
    k: int
    users: int
    batch: int
    threads: int
    chains: int


@dataclass(frozen=True)
class Server:
    """How a subject is started, and what it is asked."""

    command: list[str]
    ready: str
    direct: Sequence[Request]
    reasoning: Sequence[Request] = ()


def prompts_of(corpus: Corpus, users: int) -> list[list[int]]:
    """Direct prompts of the first test users."""
    source = PromptSource(corpus, reasoning_budget=0, exclude_seen=False)
    positions = source.evaluation_positions("test")[:users]
    return [tokens.tolist() for tokens in source.prompts(positions, ["direct"] * len(positions)).tokens]


def ours(case: Case, corpus: Corpus, port: int, _folder: Path) -> Server:
    """`gream serve`."""
    ids, url = corpus.catalogue.item_ids, f"http://127.0.0.1:{port}/v1/recommend"
    known = set(ids)

    def requests(**more: Any) -> list[Request]:
        histories = [corpus.sequences.sequence(user)[:-1] for user in range(min(case.users, len(corpus.sequences)))]
        return [
            Request(
                url,
                {"history": [ids[row] for row in rows], "k": case.k, "exclude_history": False, **more},
                lambda answer: case.k - len(known & {item["item_id"] for item in answer["items"]}),
            )
            for rows in histories
        ]

    overrides = [f"serving.beam_width={case.k}", f"serving.batch_users={case.batch}"]
    command = serve_command(case.run, case.checkpoint.parent.name, port, case.threads, overrides)
    chains = requests(mode="reasoning", chains=case.chains)
    return Server(command, f"http://127.0.0.1:{port}/readyz", requests(), chains)


def hugging_face(case: Case, corpus: Corpus, port: int, _folder: Path) -> Server:
    """transformers' constrained beam search behind FastAPI."""
    url = f"http://127.0.0.1:{port}/recommend"
    command = [
        sys.executable, "-m", "benchmarks.serving_peers", str(case.checkpoint), str(case.run / "index"), str(port),
        "--width", str(case.k), "--batch", str(case.batch), "--threads", str(case.threads),
    ]  # fmt: skip
    requests = [
        Request(url, {"tokens": tokens}, lambda answer: case.k - len({row for row in answer["items"] if row >= 0}))
        for tokens in prompts_of(corpus, case.users)
    ]
    return Server(command, f"http://127.0.0.1:{port}/health", requests)


def vllm(case: Case, corpus: Corpus, port: int, _folder: Path) -> Server:
    """vLLM's OpenAI server; a regular expression names all items, and a request samples k answers: its beam search
    takes no grammar. Samples may repeat, so the places of a list are not expected to differ.

    The grammar is one of text: it lets a name be spelled by ordinary tokens too, which are cut off before its end."""
    known = {corpus.index.text(row) for row in range(len(corpus.index))}
    body = {
        "model": "policy", "n": case.k, "temperature": 1.0, "max_tokens": corpus.index.depth + 1,
        "structured_outputs": {"regex": regex_of(corpus.index)}, "skip_special_tokens": False,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(case.checkpoint),
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager",
        "--max-model-len", "2048", "--kv-cache-memory-bytes", str(256 * 2**20), "--block-size", str(CPU_BLOCK_TOKENS),
        "--max-num-seqs", "256", "--generation-config", "vllm", "--structured-outputs-config.backend", "xgrammar",
    ]  # fmt: skip

    def invalid(answer: dict[str, Any]) -> int:
        texts = [one["text"].replace("<|end|>", "").replace(" ", "") for one in answer["choices"]]
        return sum(text not in known for text in texts)

    requests = [
        Request(f"http://127.0.0.1:{port}/v1/completions", {**body, "prompt": tokens}, invalid)
        for tokens in prompts_of(corpus, case.users)
    ]
    return Server(command, f"http://127.0.0.1:{port}/health", requests)


SUBJECTS: dict[str, Callable[[Case, Corpus, int, Path], Server]] = {
    OURS: ours, HUGGING_FACE: hugging_face, VLLM: vllm,
}  # fmt: skip


def regex_of(index: SemanticIdIndex) -> str:
    """The semantic IDs of all items. xgrammar's masks hold their tokens; llguidance's none that looks special."""
    names = [index.text(row) for row in range(len(index))]
    # Long names first: an item may be the beginning of another.
    return "(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")"


@contextmanager
def running(server: Server, threads: int, log: Path) -> Iterator[None]:
    """The subject's processes, from when it is ready; raises RuntimeError where it does not get ready."""
    process = started(server.command, threads, log)
    try:
        wait_until_ready(process, server.ready, log, START_SECONDS)
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def gream_serve(
    run: Path, stage: str, port: int, threads: int, overrides: Sequence[str], log: Path
) -> subprocess.Popen[bytes]:
    """`gream serve` of the checkpoint of a stage, as a process of its own."""
    return started(serve_command(run, stage, port, threads, overrides), threads, log)


def serve_command(run: Path, stage: str, port: int, threads: int, overrides: Sequence[str]) -> list[str]:
    """Its command line."""
    (checkpoint,) = [name for name, folder in EVALUATED_STAGES.items() if folder == stage]
    return [
        str(Path(sys.executable).with_name("gream")), "serve", "--run", str(run), f"serving.port={port}",
        f"serving.checkpoint={checkpoint}", f"cluster.threads={threads}", *overrides,
    ]  # fmt: skip


def started(command: list[str], threads: int, log: Path) -> subprocess.Popen[bytes]:
    """A process in a group of its own, that writes to a log."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    """Raises RuntimeError, with the log's last lines, where the address does not answer in time."""
    deadline = time.monotonic() + seconds
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"the server did not get ready: {' / '.join(last)}")
        time.sleep(0.5)


def free_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status == 200
    except OSError:  # refused, or an error's status
        return False
