"""What a recommender shows to all users together: how much of the catalogue, how evenly, and how popular."""

from __future__ import annotations

import numpy as np

from item_index.ragged import RaggedArray

EXPOSURE_CUTOFF = 10


def exposure_metrics(ranked_UK: np.ndarray, histories: RaggedArray, interactions_I: np.ndarray) -> dict[str, float]:
    """`coverage@10`, `entropy@10` and `popularity_lift@10` of the users' ten best items.

    - coverage: the share of the catalogue that is on a list at all.
    - entropy: of the items' shares of all places of the lists, over the log of the catalogue's size: 1 where every item
      is shown equally often, 0 where one item fills all places.
    - popularity lift (arXiv 1907.13286, with one group for all users): by how much the items shown are more popular
      than those of the users' histories, (shown - history) / history, in mean interactions of an item, averaged over a
      list and then over users. Above 0 the recommender favours popular items; users without history or list are left
      out.

    Args:
        ranked_UK: integers [users, K], item rows from best to worst, -1 after the end of a shorter list.
        histories: item rows of each user before the target.
        interactions_I: [items], interactions of each item in the train part; it fixes the catalogue's size.
    """
    shown_UK = ranked_UK[:, :EXPOSURE_CUTOFF]
    items = len(interactions_I)
    counts_I = np.bincount(shown_UK[shown_UK >= 0], minlength=items)
    shares = counts_I[counts_I > 0] / max(1, counts_I.sum())
    metrics = {
        f"coverage@{EXPOSURE_CUTOFF}": float(np.count_nonzero(counts_I) / items),
        f"entropy@{EXPOSURE_CUTOFF}": float(-(shares * np.log(shares)).sum() / np.log(items)) if items > 1 else 0.0,
    }
    usable_U = (shown_UK >= 0).any(axis=1) & (histories.lengths > 0)
    if usable_U.any():
        shown_U = np.ma.masked_where(shown_UK < 0, interactions_I[shown_UK]).mean(axis=1)[usable_U].mean()
        user = np.repeat(np.arange(len(histories)), histories.lengths)
        sums_U = np.bincount(user, weights=interactions_I[histories.values], minlength=len(histories))
        history = (sums_U[usable_U] / histories.lengths[usable_U]).mean()
        metrics[f"popularity_lift@{EXPOSURE_CUTOFF}"] = float(shown_U / history - 1)
    return metrics
