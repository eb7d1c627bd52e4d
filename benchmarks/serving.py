"""The service under load over loopback, beside two other ways to serve the same model:

    python -m benchmarks.serving runs/ml-100k

The peers are transformers' constrained beam search behind FastAPI with micro-batching, and vLLM's OpenAI server under a
regular expression of all items. One server runs at a time. For each number of clients a *closed loop*: every client
asks again as soon as it has its answer; the best throughput of these is taken for saturation. Then an *open loop*: at a
share of saturation requests come at times of a Poisson process, whatever the answers do, and the percentiles of their
times are taken. *Mixed*: direct clients beside clients of reasoning mode, which the peers do not have. The clients run
in this process, on the same cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.load import Answers, closed_loop, open_loop
from benchmarks.machine import ReportRow, write_report
from benchmarks.serving_subjects import SUBJECTS, Case, Server, free_port, running
from cluster.progress import console
from curriculum.corpus import load_corpus

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ALL, CLIENTS = list(SUBJECTS), [1, 8, 32]
UNITS = {
    "throughput": "answers/s", "p50": "ms", "p95": "ms", "p99": "ms", "refused": "requests", "failed": "requests",
    "invalid": "items",
}  # fmt: skip


@app.command()
def benchmark(
    run: Annotated[Path, typer.Argument(help="Run folder; sft is enough with --stage sft.")],
    stage: Annotated[str, typer.Option(help="Stage whose checkpoint is served: train or sft.")] = "train",
    subject: Annotated[list[str], typer.Option(help="Which servers; repeat.")] = ALL,
    k: Annotated[int, typer.Option(min=1, help="Items of a list, and beams.")] = 10,
    clients: Annotated[list[int], typer.Option(min=1, help="Clients of the closed loops; repeat.")] = CLIENTS,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each loop.")] = 30.0,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Of saturation, in the open loop.")] = 0.7,
    reasoning_clients: Annotated[int, typer.Option(min=0, help="Beside direct ones, mixed; 0 leaves it out.")] = 2,
    chains: Annotated[int, typer.Option(min=1, help="Of a request of reasoning mode.")] = 4,
    users: Annotated[int, typer.Option(min=1, help="Histories that are asked about.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Requests of one beam search at most.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each model.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the numbers are written.")] = None,
) -> None:
    """Measure throughput and times of answers of all servers."""
    unknown = set(subject) - set(SUBJECTS)
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    case = Case(run, run / stage / "checkpoint", k, users, batch, threads, chains)
    corpus = load_corpus(run / "corpus", run / "index")
    report: list[ReportRow] = []
    table = Table(title=f"{len(corpus.index)} items, lists of {k}, {threads} thread(s) a model")
    for column in ("", "load", "answers/s", "p50 ms", "p95 ms", "p99 ms", "refused", "failed", "invalid items"):
        table.add_column(column, justify="right")

    def note(name: str, loop: str, answers: Answers) -> None:
        numbers = numbers_of(answers)
        table.add_row(name, loop, *(f"{numbers[metric]:.1f}" for metric in UNITS))
        report.extend(
            {"case": loop, "subject": name, "metric": metric, "value": value, "unit": UNITS[metric]}
            for metric, value in numbers.items()
        )

    with tempfile.TemporaryDirectory() as root:
        for number, name in enumerate(subject):
            folder = Path(root) / str(number)
            folder.mkdir()
            server = SUBJECTS[name](case, corpus, free_port(), folder)
            try:
                with running(server, threads, folder / "log"):
                    for loop, answers in measured(server, clients, seconds, share, reasoning_clients):
                        note(name, loop, answers)
            except RuntimeError as error:  # a peer that does not start is named, and the others are measured
                table.add_row(name, str(error), *[""] * len(UNITS))
    console.print(table)
    if json_file is not None:
        write_report(json_file, report)


def measured(
    server: Server, clients: list[int], seconds: float, share: float, reasoning_clients: int
) -> list[tuple[str, Answers]]:
    """Every loop by name, after one to warm up."""
    closed_loop([(server.direct, max(clients))], seconds=seconds / 4)
    loops = []
    for count in clients:
        (answers,) = closed_loop([(server.direct, count)], seconds=seconds)
        loops.append((f"closed, {count} clients", answers))
    rate = share * max(answers.throughput for _, answers in loops)
    loops.append((f"open, {share:.0%} of saturation", open_loop(server.direct, rate=rate, seconds=seconds, seed=0)))
    if server.reasoning and reasoning_clients:
        groups = [(server.direct, max(clients)), (server.reasoning, reasoning_clients)]
        direct, reasoning = closed_loop(groups, seconds=seconds)
        loops.append((f"mixed, {max(clients)} direct clients", direct))
        loops.append((f"mixed, {reasoning_clients} reasoning clients", reasoning))
    return loops


def numbers_of(answers: Answers) -> dict[str, float]:
    """One number for each of UNITS."""
    return {
        "throughput": answers.throughput,
        **{f"p{percent}": 1000 * answers.percentile(percent) for percent in (50, 95, 99)},
        "refused": answers.refused, "failed": answers.failed, "invalid": answers.invalid,
    }  # fmt: skip


if __name__ == "__main__":
    app()
