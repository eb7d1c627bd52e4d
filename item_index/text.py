"""Item text: cleaned, and put together in one passage per item."""

from __future__ import annotations

import html
import re

from item_index.catalogue import Catalogue

# Role and code tokens such as <|a_12|> and markers such as <think> go as well: in a prompt, text from outside must
# never turn into a token that has a meaning of its own.
_MARKUP = re.compile(
    r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|</?[a-z][^<>]*>|<![a-z][^<>]*>|<\|[^<>]*\|>", re.IGNORECASE | re.DOTALL
)
# Tags that stand within a word or next to a full stop leave no space behind.
_INLINE = re.compile(r"</?(?:a|b|big|em|font|i|mark|small|span|strong|sub|sup|u)(?:\s[^<>]*)?>", re.IGNORECASE)
_SPACES = re.compile(r"[\s\x00-\x1f\x7f]+")


def clean_text(text: str) -> str:
    """Text without HTML entities, tags, special tokens, line breaks and repeated spaces.

    Cleaning what is clean changes nothing: it goes on until nothing is left to remove, so escaped or nested markup does
    not come through.
    """
    while True:
        cleaned = _SPACES.sub(" ", _MARKUP.sub(" ", _INLINE.sub("", html.unescape(text)))).strip()
        if cleaned == text:
            return cleaned
        text = cleaned


def cut_words(text: str, maximum_words: int) -> str:
    """The first `maximum_words` words."""
    if maximum_words < 1:
        raise ValueError(f"maximum_words must be at least 1, got {maximum_words}")
    words = text.split(" ")
    return text if len(words) <= maximum_words else " ".join(words[:maximum_words])


def item_texts(catalogue: Catalogue, *, maximum_words: int = 256) -> list[str]:
    """One passage per item: title, categories, brand and description, each as a sentence where it is not empty.

    The whole is cut after `maximum_words` words, so a long description loses its end and the title stays.
    """
    passages = []
    for title, categories, brand, description in zip(
        catalogue.titles, catalogue.categories, catalogue.brands, catalogue.descriptions, strict=True
    ):
        parts = (clean_text(part) for part in (title, ", ".join(categories), brand, description))
        sentences = (part if part.endswith((".", "!", "?")) else f"{part}." for part in parts if part)
        passages.append(cut_words(" ".join(sentences), maximum_words))
    return passages
