"""Checkpoints with random weights and a tokenizer of as many words as a case asks for: w0, w1, ..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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
