"""One supervised optimizer step on rows of tokens with a loss mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from item_index.ragged import RaggedArray
from learner.engine import LearnerEngine
from learner.packing import PackedBatch, micro_batches, pack_rows


def supervised_step(
    engine: LearnerEngine, tokens: RaggedArray, learnt: RaggedArray, *, micro_batch_tokens: int
) -> dict[str, float]:
    """Cross-entropy averaged over the learnt tokens of all rows; `learnt` is bool beside `tokens`."""
    batches = [
        pack_rows([(tokens[int(row)], learnt[int(row)]) for row in rows])
        for rows in micro_batches(tokens.lengths, micro_batch_tokens)
    ]
    batches = [batch for batch in batches if len(batch.targets_T)]
    count = sum(len(batch.targets_T) for batch in batches)
    engine.engine.train()
    total = 0.0

    def losses() -> Iterator[torch.Tensor]:
        nonlocal total
        for batch in batches:
            loss = -engine.policy(batch).sum() / count
            total += loss.item()
            yield loss

    norm = engine.step(losses(), len(batches))
    return {"loss": total, "gradient_norm": norm, "learning_rate": engine.learning_rate, "learnt_tokens": float(count)}


@torch.inference_mode()
def supervised_loss(
    policy: torch.nn.Module, tokens: RaggedArray, learnt: RaggedArray, *, micro_batch_tokens: int
) -> float:
    """The same mean cross-entropy without a step."""
    policy.eval()
    total, count = 0.0, 0
    for rows in micro_batches(tokens.lengths, micro_batch_tokens):
        batch: PackedBatch = pack_rows([(tokens[int(row)], learnt[int(row)]) for row in rows])
        total -= policy(batch).sum().item()
        count += len(batch.targets_T)
    return total / max(count, 1)
