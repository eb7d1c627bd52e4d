"""Low-rank weights (LoRA) beside frozen ones, with the rows of new tokens trained in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch

ADAPTER = "default"


@dataclass(frozen=True)
class LowRankSettings:
    """Rank of the added weights, their scale (alpha / rank), dropout before them, and names of the modules that get
    them."""

    rank: int
    alpha: int
    dropout: float
    modules: tuple[str, ...]


def add_low_rank_weights(model: Any, settings: LowRankSettings, *, known_tokens: int | None) -> Any:
    """Freeze the model except for low-rank weights in the named modules and embedding rows from `known_tokens` on;
    None freezes all rows.

    Rows of known tokens keep their values: their gradient is zero, and they are exempt from weight decay. Works in
    place and returns the model, whose structure stays (layers are not wrapped as a whole).
    """
    # peft's settings object names modules of the whole model; injected in place, so that callers see the same model.
    adapter = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(settings.modules), bias="none",
    )  # fmt: skip
    model = peft.inject_adapter_in_model(adapter, model, adapter_name=ADAPTER)
    if known_tokens is None:
        return model
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


def merged_weights(model: Any) -> dict[str, torch.Tensor]:
    """The state of a plain model that computes what this one does: low-rank weights, if there are any, merged in."""
    weights = {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in _low_rank_layers(model):
        base = layer.get_base_layer().weight.detach()
        merged = base.float() + layer.get_delta_weight(ADAPTER).detach().float()
        weights[f"{name}.weight"] = merged.to(base.dtype)
    return weights


@contextmanager
def without_low_rank_weights(model: Any) -> Iterator[None]:
    """Within it the model computes what it did before low-rank weights were added, known rows of embeddings included
    only where those are frozen. Not for gradients."""
    layers = [layer for _, layer in _low_rank_layers(model)]
    for layer in layers:
        layer.scale_layer(0.0)  # switching the adapters off would take their gradients from DeepSpeed
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer()


def _low_rank_layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
