"""The policy: a causal language model whose vocabulary holds the semantic-ID tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from item_index.constraint import AllowedTokens
from item_index.input_error import InputError
from learner.log_probabilities import (
    allowed_log_probabilities,
    full_vocabulary_log_probabilities,
    log_valid_masses,
)
from learner.packed_attention import PACKED
from learner.packing import PackedBatch


def build_language_model(
    tokenizer: Any, *, hidden_size: int, layers: int, intermediate_size: int, seed: int, positions: int = 2048
) -> LlamaForCausalLM:
    """A small Llama from scratch: float32, head not tied, head size 32 (the least that vLLM's CPU build takes)."""
    if hidden_size % 32:
        raise InputError(f"hidden_size must be a multiple of 32, got {hidden_size}", field="model.hidden_size")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def load_language_model(path: str | Path, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A local checkpoint (safetensors only), with `PACKED` attention for a policy."""
    if not Path(path).is_dir():
        raise InputError("there is no such checkpoint folder", file=path, remedy="Name a local folder.")
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=attention,
    )


def fit_vocabulary(model: Any, tokenizer: Any, *, known_tokens: int, seed: int) -> int:
    """Give the model a row for every token of the tokenizer; returns how many tokens are new.

    Tokens from `known_tokens` on are new, also where the checkpoint has padding rows at their place. A new row is the
    mean of the known ones plus noise of a tenth of their deviation, so that no two new tokens start as twins; tied
    heads stay tied.
    """
    new_tokens = len(tokenizer) - known_tokens
    if new_tokens <= 0:
        return 0
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for embedding in [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()]):
        weight = embedding.weight.data
        known = weight[:known_tokens].float()
        noise = torch.randn(new_tokens, weight.shape[1], generator=generator)
        weight[known_tokens : len(tokenizer)] = (known.mean(dim=0) + 0.1 * known.std(dim=0) * noise).to(weight.dtype)
    return new_tokens


def add_dropout(language_model: Any, rate: float) -> None:
    """Drop a share of the embeddings, and of what each attention and feed-forward block adds, while the model trains.

    This is the residual dropout of arXiv 1706.03762 (section 5.4), which decoders of today come without: pre-training
    sees no text twice, but a data set of a hundred thousand interactions is gone over many times. Checkpoints know
    nothing of it. Raises InputError for a model whose layers have no `self_attn` and `mlp`.
    """

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], rate, module.training), *output[1:])
        return nn.functional.dropout(output, rate, module.training)

    blocks = [module for name, module in language_model.named_modules() if name.endswith((".self_attn", ".mlp"))]
    if not blocks:
        raise InputError(f"{type(language_model).__name__} has no self_attn and mlp to drop from", field="sft.dropout")
    for module in (language_model.get_input_embeddings(), *blocks):
        module.register_forward_hook(drop)


class Policy(nn.Module):
    """Log-probabilities of the predicted tokens of a packed batch, so that DeepSpeed wraps what is really computed."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(
        self,
        batch: PackedBatch,
        allowed: AllowedTokens | None = None,
        free_text_masks: torch.Tensor | None = None,
        temperature: float = 1.0,
        *,
        valid_mass: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """float32 [T]: over the allowed sets where they are given, over the whole vocabulary otherwise.

        With `valid_mass` also the log valid mass [C] of the places inside semantic IDs, in their order.
        """
        implementation = self.language_model.config._attn_implementation
        if implementation != PACKED:
            raise ValueError(f"packed batches need a model with {PACKED} attention, and this one has {implementation}")
        hidden_LH = self.language_model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, packed_parts=batch.parts
        ).last_hidden_state[0]
        # All responses of a prompt begin behind its last token, so places repeat. The gradient of hidden_LH[places]
        # would add up in the order in which threads come to them; that of index_select does not depend on threads.
        hidden_TH = hidden_LH.index_select(0, batch.position_T)
        head_VH = self.language_model.get_output_embeddings().weight
        if allowed is None or free_text_masks is None:
            return full_vocabulary_log_probabilities(hidden_TH, head_VH, batch.targets_T)
        values_T = allowed_log_probabilities(
            hidden_TH, head_VH, batch.targets_T, allowed, free_text_masks, temperature=temperature
        )
        if not valid_mass:
            return values_T
        inside = torch.from_numpy(np.flatnonzero(allowed.free_text < 0)).to(values_T.device)
        return values_T, log_valid_masses(
            hidden_TH[inside], head_VH, batch.targets_T[inside], values_T[inside], temperature=temperature
        )
