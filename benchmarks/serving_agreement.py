"""Whether a service's direct answers are those of `gream evaluate`, for all users of a run that it has evaluated.

    gream serve --run runs/ml-100k
    python -m benchmarks.serving_agreement runs/ml-100k --url http://127.0.0.1:8000

Each evaluated user's history, without the test target, is asked about over HTTP, and the items are compared, place by
place, with those of `evaluation/rankings.parquet`. Batches are put together otherwise, so sums are rounded otherwise:
places may differ where two scores lie within 1e-4. The exit status is 1 where any other place differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from curriculum.corpus import load_corpus

GAP = 1e-4
SECONDS = 120.0
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def differing_places(items: Sequence[Any], scores: Sequence[float], expected: Sequence[Any]) -> tuple[int, int]:
    """Places where two lists differ: those within GAP of a neighbour's score, and the others.

    `scores` are of `items`; behind the last of a full list may stand an item as good, so its place counts as close.
    """
    if len(items) != len(expected):
        return 0, max(len(items), len(expected))
    gaps = -np.diff(scores)
    close = np.concatenate([[False], gaps <= GAP]) | np.concatenate([gaps <= GAP, [True]])
    differs = np.array([one != other for one, other in zip(items, expected, strict=True)])
    return int((differs & close).sum()), int((differs & ~close).sum())


@app.command()
def agreement(
    run: Annotated[Path, typer.Argument(help="Run folder with its evaluation.")],
    url: Annotated[str, typer.Option(help="Where the service of that run listens.")] = "http://127.0.0.1:8000",
    system: Annotated[str, typer.Option(help="Which rankings are compared.")] = "direct_srpo",
    clients: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    key: Annotated[str, typer.Option(envvar="GREAM_KEY", help="API key.")] = "",
) -> None:
    """Compare a service's direct answers with those of the evaluation."""
    corpus = load_corpus(run / "corpus", run / "index")
    rankings = pq.read_table(run / "evaluation" / "rankings.parquet")
    rankings = rankings.filter(pc.equal(rankings["system"], system))
    if not len(rankings):
        raise typer.BadParameter(f"the evaluation has no rankings of {system}")
    places = {user: place for place, user in enumerate(corpus.sequences.user_ids)}
    ids = corpus.catalogue.item_ids
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    with httpx.Client(base_url=url, headers=headers, timeout=SECONDS) as client, ThreadPoolExecutor(clients) as pool:

        def compared(row: dict[str, Any]) -> tuple[int, int, int]:
            history = corpus.sequences.sequence(places[row["user_id"]])[:-1]
            body = {"history": [ids[item] for item in history], "k": len(row["items"])}
            answer = client.post("/v1/recommend", json=body).raise_for_status().json()["items"]
            items, scores = [one["item_id"] for one in answer], [one["score"] for one in answer]
            return len(items), *differing_places(items, scores, row["items"])

        counts = np.array(list(pool.map(compared, rankings.to_pylist())))
    total, close, wrong = counts.sum(axis=0).tolist()
    print(f"{len(counts)} users, {total} places: {total - close - wrong} as in the evaluation")
    print(f"{close} differ where scores lie within {GAP:g}, {wrong} elsewhere")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app()
