"""Checkpoints with random weights: with a tokenizer of as many words as a case asks for (w0, w1, ...), or for items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import STRUCTURE_TOKENS


def write_random_model(folder: Path, vocabulary: int, **shape: Any) -> int:
    """Write a Llama of the given shape; returns the weights that are neither embeddings nor the output head."""
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="w0", eos_token="w1"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=2048, bos_token_id=None, eos_token_id=1, pad_token_id=0,
            **shape,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(
        weight.numel() for name, weight in model.named_parameters() if "embed" not in name and "head" not in name
    )


def write_item_model(folder: Path, index: SemanticIdIndex, vocabulary: int, **shape: Any) -> None:
    """Write a Llama with random weights and a small byte-level tokenizer that knows the tokens of an index.

    The tokens of the index are ordinary ones, so that grammars over text see them. `vocabulary` are the rows of the
    output head; those beyond the tokenizer are padding, which only the constraint keeps from being sampled.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = np.random.default_rng(0).integers(0, 26, (20_000, 6))
    texts = [" ".join("".join(chr(97 + letter) for letter in word) for word in words)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    wanted = [*STRUCTURE_TOKENS, *(token for level in index.tokens() for token in level)]
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in wanted])
    if len(fast) > vocabulary:
        raise ValueError(f"a vocabulary of {vocabulary} cannot hold the {len(fast)} tokens of the index and its text")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=2048, bos_token_id=None, eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id, **shape,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
