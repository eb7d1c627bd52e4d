"""One supervised optimizer step, and the loss without a step, on rows of tokens with a loss mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from item_index.ragged import RaggedArray
from learner.engine import LearnerEngine
from learner.packing import PLACEHOLDER, PackedBatch, balanced_micro_batches, pack_rows


def learnt_tokens(learnt: RaggedArray) -> int:
    """Tokens that are targets: learnt ones, without the first of a row."""
    return int(learnt.values.sum() - learnt.values[learnt.offsets[:-1]].sum())


def rank_batches(
    engine: LearnerEngine, tokens: RaggedArray, learnt: RaggedArray, micro_batch_tokens: int
) -> list[PackedBatch | None]:
    """This rank's packed micro-batches of rows that all ranks have in hand; None for an empty one."""
    plan = balanced_micro_batches(tokens.lengths, ranks=engine.ranks, token_budget=micro_batch_tokens)[engine.rank]
    return [
        pack_rows([(tokens[int(row)], learnt[int(row)]) for row in rows]).to(engine.device) if len(rows) else None
        for rows in plan
    ]


def supervised_step(
    engine: LearnerEngine, tokens: RaggedArray, learnt: RaggedArray, *, micro_batch_tokens: int
) -> dict[str, float]:
    """One optimizer step on the cross-entropy averaged over the learnt tokens of all rows, of all ranks together.

    Args:
        tokens, learnt: int32 and bool, the rows of the step, the same on every rank; a row's first token is not learnt.
        micro_batch_tokens: tokens of one forward pass at most; a longer row goes alone.
    """
    count = learnt_tokens(learnt)
    if count == 0:
        raise ValueError("no token of these rows is learnt")
    batches = rank_batches(engine, tokens, learnt, micro_batch_tokens)
    engine.engine.train()
    total = 0.0

    def losses() -> Iterator[torch.Tensor]:
        nonlocal total
        for batch in batches:
            if batch is None or not len(batch.targets_T):
                # Every rank takes part in every reduction: a micro-batch without targets has a loss of zero.
                yield engine.policy(pack_rows([PLACEHOLDER]).to(engine.device)).sum() * 0.0
                continue
            loss = -engine.policy(batch).sum() / count
            total += loss.item()
            yield loss * engine.ranks  # DeepSpeed averages over the ranks

    norm = engine.step(losses(), len(batches))
    return {
        "loss": engine.totals([total])[0],
        "gradient_norm": norm,
        "skipped": float(engine.skipped),
        "learning_rate": engine.learning_rate,
        "learnt_tokens": float(count),
        "tokens": float(tokens.lengths.sum()),
    }


@torch.no_grad()  # not inference mode: ZeRO 3 keeps parameters that it gathers
def supervised_loss(
    engine: LearnerEngine, tokens: RaggedArray, learnt: RaggedArray, *, micro_batch_tokens: int
) -> float:
    """The same mean cross-entropy without a step."""
    engine.engine.eval()
    total = 0.0
    for batch in rank_batches(engine, tokens, learnt, micro_batch_tokens):
        if batch is None:
            engine.policy(pack_rows([PLACEHOLDER]).to(engine.device))
        else:
            total -= engine.policy(batch).sum().item()
    return engine.totals([total])[0] / max(learnt_tokens(learnt), 1)
