from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from item_index.catalogue import Catalogue
from item_index.text import clean_text, cut_words, item_texts


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Salt &amp; pepper", "Salt & pepper"),
        ("Salt &amp;amp; pepper", "Salt & pepper"),
        ("one<br/>two\r\n\tthree", "one two three"),
        ("&lt;p class='x'&gt;hidden markup&lt;/p&gt;", "hidden markup"),
        ("before<!-- note --><script>var x = '<b>';</script>after", "before after"),
        ("3 < 4 and 5 > 4", "3 < 4 and 5 > 4"),
        ("I <3 this", "I <3 this"),
        ("a\u00a0b\x00c", "a b c"),
        ("think <think> and <|a_12|><|im_end|> stop", "think and stop"),
        ("<answ<b>er>", ""),
        ("H<sub>2</sub>O <a href='x'>here</a>.", "H2O here."),
        ("", ""),
        ("<br>", ""),
    ],
)
def test_clean_text(raw: str, cleaned: str) -> None:
    assert clean_text(raw) == cleaned


@given(st.text(alphabet=st.sampled_from(list("ab <>/!|-&;ltgmp#\n\t\"'")), max_size=60))
def test_cleaning_twice_changes_nothing(text: str) -> None:
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    assert "\n" not in cleaned
    assert "  " not in cleaned
    assert "<a>" not in cleaned


@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=12), st.integers(1, 15))
def test_cut_words_keeps_the_first_words(words: list[str], maximum: int) -> None:
    assert cut_words(" ".join(words), maximum).split() == words[:maximum]


def test_cut_to_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="maximum_words"):
        cut_words("a b", 0)


def test_item_texts_hold_title_categories_brand_and_description() -> None:
    catalogue = Catalogue(
        item_ids=(1, 2),
        titles=("Who&#39;s There?", "Go"),
        descriptions=("", "Old <b>game</b>."),
        categories=((), ("Board", "Two players")),
        brands=("", "Stones"),
    )
    assert item_texts(catalogue) == ["Who's There?", "Go. Board, Two players. Stones. Old game."]


def test_long_text_is_cut_and_never_blank() -> None:
    catalogue = Catalogue((1,), ("A title of words",), ("word " * 1000,), ((),), ("",))
    assert item_texts(catalogue, maximum_words=6) == ["A title of words. word word"]
    assert item_texts(catalogue, maximum_words=1) == ["A"]
