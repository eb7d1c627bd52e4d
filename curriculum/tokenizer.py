"""The checkpoint's tokenizer: trained from scratch for a small model, or a named one that gets the index's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from curriculum.prompts import SYSTEM_PROMPTS
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import STRUCTURE_TOKENS

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], index: SemanticIdIndex, *, vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts` (and the system prompts), with every structure token, role token
    and semantic-ID token as one special token. `vocabulary_size` counts the BPE part (at least 256 bytes)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *SYSTEM_PROMPTS.values()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    add_index_tokens(fast, index, roles=ROLES)
    return fast


def load_tokenizer(path: str | Path, index: SemanticIdIndex) -> Any:
    """The tokenizer of a named local checkpoint, with the index's tokens added where it lacks them."""
    if not Path(path).is_dir():
        raise InputError(
            "there is no such checkpoint folder", file=path, field="model.checkpoint", remedy="Name a local folder."
        )
    from transformers import AutoTokenizer  # see `saved_tokenizer`

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    add_index_tokens(tokenizer, index)
    return tokenizer


def saved_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that a stage has saved into a corpus or a checkpoint, of the class that is written there.

    AutoTokenizer gives the same and imports all that models need for it: 6 s of a core and 400 MB, in processes that
    have no model.
    """
    written = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    return getattr(transformers, written["tokenizer_class"]).from_pretrained(folder, local_files_only=True)


def add_index_tokens(tokenizer: Any, index: SemanticIdIndex, *, roles: tuple[str, ...] = ()) -> int:
    """Add the structure tokens and the index's tokens as special tokens; returns how many were new."""
    wanted = [*roles, *STRUCTURE_TOKENS, *(token for level in index.tokens() for token in level)]
    known = tokenizer.get_vocab()
    fresh = [AddedToken(token, special=True, normalized=False) for token in wanted if token not in known]
    return tokenizer.add_tokens(fresh, special_tokens=True)
