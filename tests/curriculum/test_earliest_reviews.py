from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest

from curriculum.earliest_reviews import EarliestReviews

Rows = list[tuple[int, int, str, str]]


def expected(rows: Rows, most: int) -> dict[int, list[tuple[str, str]]]:
    """Everything sorted at once, a dictionary for the users: slow, and plain to see."""
    users: dict[int, dict[str, str]] = defaultdict(dict)
    for item, _, user, text in sorted(rows):
        users[item].setdefault(user, text)
    return {item: list(texts.items())[:most] for item, texts in users.items()}


def kept(folder: Path, rows: Rows, most: int, characters: int) -> list[tuple[int, list[tuple[str, str]]]]:
    earliest = EarliestReviews(folder, most, characters_in_memory=characters)
    for row in rows:
        earliest.add(*row)
    return [(item, [(review.user_id, review.text) for review in reviews]) for item, reviews in earliest.by_item()]


@pytest.mark.parametrize("most", [1, 3, 100])
@pytest.mark.parametrize("characters", [1, 4_000, 1 << 28])
def test_runs_of_any_size_keep_what_one_sort_keeps(tmp_path: Path, most: int, characters: int) -> None:
    generator = random.Random(most * characters)
    rows = [
        (generator.randrange(9) * 7, generator.randrange(5), f"u{generator.randrange(6)}", f"text {generator.random()}")
        for _ in range(200)
    ]
    found = kept(tmp_path, rows, most, characters)
    assert [item for item, _ in found] == sorted({row[0] for row in rows})
    assert dict(found) == expected(rows, most)
    runs = len(list(tmp_path.iterdir()))
    assert runs == {1: 200, 4_000: runs, 1 << 28: 0}[characters]
    assert characters != 4_000 or runs > 3


def test_the_order_of_coming_does_not_matter(tmp_path: Path) -> None:
    rows = [(0, time, f"u{user}", f"said at {time} by {user}") for time in range(4) for user in range(5)]
    shuffled = random.Random(1).sample(rows, len(rows))
    for name in "ab":
        (tmp_path / name).mkdir()
    assert kept(tmp_path / "a", rows, 3, 900) == kept(tmp_path / "b", shuffled, 3, 1_500)


def test_a_user_counts_once_with_the_earliest_text(tmp_path: Path) -> None:
    rows = [(5, 3, "ann", "later"), (5, 1, "ann", "first"), (5, 2, "bob", "second"), (5, 1, "ann", "first too")]
    assert kept(tmp_path, rows, 2, 1) == [(5, [("ann", "first"), ("bob", "second")])]


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    assert kept(tmp_path, [], 2, 1) == []
    with pytest.raises(ValueError, match="at least 1"):
        EarliestReviews(tmp_path, 0)
