"""Neural baselines that read the history in order: SASRec and GRU4Rec, trained on every next item by full softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from item_index.ragged import RaggedArray

SequentialArchitecture = Literal["sasrec", "gru4rec"]
HEADS = 2


class SelfAttentionEncoder(nn.Module):
    """SASRec (arXiv 1808.09781): learnt positions, then blocks of causal self-attention."""

    def __init__(self, width: int, layers: int, dropout: float, window: int) -> None:
        super().__init__()
        self.positions_LD = nn.Parameter(torch.randn(window, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(
            width, HEADS, dim_feedforward=width, dropout=dropout, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, embedded_BLD: Tensor) -> Tensor:
        length = embedded_BLD.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.blocks(self.dropout(embedded_BLD + self.positions_LD[:length]), mask=mask, is_causal=True)


class RecurrentEncoder(nn.Module):
    """GRU4Rec (arXiv 1511.06939), with the cross-entropy over all items in the place of sampled losses."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.cells = nn.GRU(width, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.out = nn.Linear(width, width)

    def forward(self, embedded_BLD: Tensor) -> Tensor:
        return self.out(self.dropout(self.cells(self.dropout(embedded_BLD))[0]))


@dataclass
class SequentialRecommender:
    """Scores an item by its embedding's inner product with the encoded last `window` items of the history.

    Trained by Adam on every item of the users' sequences but their first, `passes` times, in windows whose borders are
    drawn anew for each pass; inputs and outputs share their embeddings. Runs are equal for equal seeds. An empty
    history scores 0 everywhere.
    """

    architecture: SequentialArchitecture
    width: int = 64
    layers: int = 2
    dropout: float = 0.2
    window: int = 20
    learning_rate: float = 1e-3
    passes: int = 40
    batch_windows: int = 128
    seed: int = 0
    embeddings: nn.Embedding = field(init=False, repr=False)
    encoder: nn.Module = field(init=False, repr=False)

    def fit(self, train: list[np.ndarray], items: int) -> Self:
        """Train on the users' items in time order; `items` is the size of the catalogue. Returns the recommender.

        Raises ValueError for an item outside the catalogue, and where nobody has two items.
        """
        for _ in self.training(train, items):
            pass
        return self

    def training(self, train: list[np.ndarray], items: int) -> Iterator[int]:
        """Train pass by pass; yields the number of passes done, and can score at each. ValueError as for `fit`."""
        rows = RaggedArray.of(train, np.int64)
        if len(rows.values) and not 0 <= rows.values.min() <= rows.values.max() < items:
            raise ValueError(f"a training item is not a row of the {items} items")
        if not (rows.lengths > 1).any():
            raise ValueError("nobody has two items, so there is no next item to train on")
        generator = np.random.default_rng([self.seed, 0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.embeddings = nn.Embedding(items + 1, self.width, padding_idx=items)  # the last row fills windows up
            nn.init.normal_(self.embeddings.weight[:items].data, std=0.02)
            self.encoder = (
                SelfAttentionEncoder(self.width, self.layers, self.dropout, self.window)
                if self.architecture == "sasrec"
                else RecurrentEncoder(self.width, self.layers, self.dropout)
            )
            dropout_state = torch.get_rng_state()
        optimizer = torch.optim.Adam([*self.embeddings.parameters(), *self.encoder.parameters()], self.learning_rate)
        for done in range(1, self.passes + 1):
            windows_WL = training_windows(rows, self.window, generator)
            windows_WL = windows_WL[generator.permutation(len(windows_WL))]
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(dropout_state)
                self.encoder.train()
                for start in range(0, len(windows_WL), self.batch_windows):
                    loss = self._loss(torch.from_numpy(windows_WL[start : start + self.batch_windows]))
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                dropout_state = torch.get_rng_state()
            yield done

    def _loss(self, windows_BL: Tensor) -> Tensor:
        """Mean cross-entropy of the windows' next items; -1 fills a window up."""
        items = self.embeddings.num_embeddings - 1
        inputs, targets = windows_BL[:, :-1], windows_BL[:, 1:]
        hidden_BLD = self.encoder(self.embeddings(inputs.masked_fill(inputs < 0, items)))
        counted = targets >= 0
        logits_TI = hidden_BLD[counted] @ self.embeddings.weight[:items].T
        return nn.functional.cross_entropy(logits_TI, targets[counted])

    @torch.inference_mode()
    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """float32 [users, items], higher is better; items of the history are scored like any other."""
        items = self.embeddings.num_embeddings - 1
        self.encoder.eval()
        recent = [history[-self.window :] for history in histories]
        inputs_UL = torch.full((len(recent), self.window), items)
        for user, history in enumerate(recent):
            inputs_UL[user, : len(history)] = torch.from_numpy(np.asarray(history, dtype=np.int64))
        lengths_U = torch.tensor([len(history) for history in recent])
        hidden_ULD = self.encoder(self.embeddings(inputs_UL))
        last_UD = hidden_ULD[torch.arange(len(recent)), (lengths_U - 1).clamp(min=0)]
        return ((last_UD @ self.embeddings.weight[:items].T) * (lengths_U > 0)[:, None]).numpy()


def training_windows(rows: RaggedArray, window: int, generator: np.random.Generator) -> np.ndarray:
    """Windows in which each item of a user but the first is a target once: int64 [W, window + 1], -1 at the end.

    A window begins with the last item of the one before, which is its first input; where a user's first window ends is
    drawn.
    """
    lengths = rows.lengths
    users = np.flatnonzero(lengths > 1)
    first_end = generator.integers(1, window + 1, size=len(users))  # targets of the first window
    further = -(-np.maximum(lengths[users] - 1 - first_end, 0) // window)
    count = 1 + further
    user = np.repeat(np.arange(len(users)), count)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    begin = np.where(number == 0, 0, first_end[user] + (number - 1) * window)
    end = np.minimum(np.where(number == 0, first_end[user], begin + window), lengths[users][user] - 1)
    places_WL = begin[:, None] + np.arange(window + 1)
    inside_WL = places_WL <= end[:, None]
    offsets = rows.offsets[:-1][users][user][:, None]
    return np.where(inside_WL, rows.values[np.where(inside_WL, offsets + places_WL, 0)], -1)
