"""Low-rank weights (LoRA) beside frozen ones, with the rows of new tokens trained in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch

from learner.policy import load_language_model

ADAPTER = "default"


@dataclass(frozen=True)
class LowRankSettings:
    """Rank of the added weights, their scale (alpha / rank), dropout before them, and names of the modules that get
    them."""

    rank: int
    alpha: int
    dropout: float
    modules: tuple[str, ...]


def add_low_rank_weights(model: Any, settings: LowRankSettings, *, known_tokens: int) -> Any:
    """Freeze the model except for low-rank weights in the named modules and embedding rows from `known_tokens` on.

    Rows of known tokens keep their values: their gradient is zero, and they are exempt from weight decay. Works in
    place and returns the model, whose structure stays (layers are not wrapped as a whole).
    """
    # peft's settings object names modules of the whole model; injected in place, so that callers see the same model.
    model = peft.inject_adapter_in_model(_peft_settings(settings), model, adapter_name=ADAPTER)
    embeddings = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings().weight
    if head is not embeddings[0]:
        embeddings.append(head)

    def only_new_rows(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(gradient[:known_tokens]), gradient[known_tokens:]])

    for weight in embeddings:
        weight.requires_grad_(True)
        weight.register_hook(only_new_rows)
        weight.exempt_from_decay = True
    return model


def merged_language_model(path: str, settings: LowRankSettings, weights: dict[str, torch.Tensor]) -> Any:
    """The model at `path` with trained weights (as `LearnerEngine.weights` names them), low-rank ones merged in."""
    adapted: Any = peft.inject_adapter_in_model(
        _peft_settings(settings), load_language_model(path), adapter_name=ADAPTER
    )
    adapted.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    adapted.tie_weights()
    merged = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer: Any = module  # peft types neither method
            base = layer.get_base_layer().weight
            merged[f"{name}.weight"] = base.detach() + layer.get_delta_weight(ADAPTER).detach()
    kept = {
        name.replace(".base_layer.", "."): weight
        for name, weight in adapted.state_dict().items()
        if ".lora_" not in name
    }
    model = load_language_model(path)
    model.load_state_dict(kept | merged)
    return model


def _peft_settings(settings: LowRankSettings) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(settings.modules), bias="none",
    )  # fmt: skip
