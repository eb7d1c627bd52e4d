"""How much memory the processes of the SRPO stage take, by arithmetic on the model's shape; nothing is loaded.

The learner's activations are what autograd keeps of transformers' Llama and Qwen3 layers under packed attention; a test
measures them. DeepSpeed's and vLLM's parts follow from what they allocate. Allocators' losses are not in it: leave a
tenth of a GPU free.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.learning_settings import TrainSettings
from cluster.settings import ClusterSettings
from item_index.input_error import InputError
from learner.log_probabilities import CHUNK_BYTES, KEPT_BYTES

GIB = 2**30
CONTEXT_BYTES = GIB  # of a process on a GPU: CUDA, its libraries and their kernels
REDUCE_BUCKET = 500_000_000  # elements, DeepSpeed's default
PREFILL_TOKENS = 8192  # that an engine computes at once
BYTES = {"float32": 4, "bfloat16": 2}

# Shapes of models that can be planned for before they are downloaded, by the name of the folder.
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8}
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-1.7B": _QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-4B": _QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen3-8B": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """Widths in elements; `parameters` counts tied ones once."""

    parameters: int
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    normed_heads: bool

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Of a transformers config."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            parameters=sum(weight.numel() for weight in model.parameters()), vocabulary=config.vocab_size,
            hidden=config.hidden_size, intermediate=config.intermediate_size, layers=config.num_hidden_layers,
            queries=head * config.num_attention_heads, keys=head * config.num_key_value_heads,
            normed_heads=config.model_type == "qwen3",
        )  # fmt: skip

    @classmethod
    def of_checkpoint(cls, checkpoint: str) -> ModelShape:
        """Of a local checkpoint, or of a known model that a path ends with."""
        if (Path(checkpoint) / "config.json").is_file():
            return cls.of(AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False))
        known = KNOWN_MODELS.get(Path(checkpoint).name)
        if known is None:
            raise InputError(
                "there is no such checkpoint folder, and its name is none of the known models "
                f"{', '.join(KNOWN_MODELS)}", file=checkpoint, field="model.checkpoint",
            )  # fmt: skip
        return cls.of(AutoConfig.for_model(**known))

    def layer_bytes(self, width: int) -> int:
        """What autograd keeps of one layer for a token, with elements of `width` bytes."""
        # A norm keeps its input in float32, the normed states and what the next product reads; heads likewise.
        norms = 2 * self.hidden * (4 + 2 * width)
        heads = (self.queries + self.keys) * (4 + width) if self.normed_heads else 0
        attention = (3 * self.queries + 2 * self.keys) * width
        return norms + heads + attention + 4 * self.intermediate * width

    def activation_bytes(self, tokens: int, width: int, *, checkpointing: bool) -> int:
        """What autograd keeps of a forward pass over some packed tokens, all of them predicted, less what the head's
        own chunks are."""
        last = self.hidden * (4 + 2 * width)  # the last norm, and the states that the head reads
        if checkpointing:  # a layer's input each, and one layer that is computed again
            return tokens * (last + self.layers * self.hidden * width + self.layer_bytes(width))
        return tokens * (last + self.layers * self.layer_bytes(width))

    def cache_bytes(self, width: int) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.keys * width


def learner_memory(shape: ModelShape, train: TrainSettings) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a learner rank by what they are for: on its device, and on the host."""
    width, ranks, stage = BYTES[train.dtype], train.ranks, train.zero_stage
    trained = shape.parameters if train.low_rank is None else _low_rank_parameters(shape, train)
    weights = shape.parameters * width
    optimizer = 8 * trained if stage == 0 else (4 + 4 + 8) * trained // ranks  # master, its gradient, two moments
    # A frozen head has no gradient; that of a trained one is made in float32.
    head = 0 if train.low_rank is not None else shape.vocabulary * shape.hidden * (4 + width)
    device = {
        "weights": weights // (ranks if stage == 3 else 1),
        "gathered weights": min(weights, 1_000_000_000 * width) if stage == 3 else 0,
        "gradients": trained * width // (ranks if stage >= 2 else 1),
        "optimizer": 0 if train.offload_optimizer else optimizer,
        "reduce bucket": min(trained, REDUCE_BUCKET) * width if stage else 0,
        "reference": 0 if train.low_rank is not None else weights,
        "activations": shape.activation_bytes(
            train.micro_batch_tokens, width, checkpointing=train.gradient_checkpointing
        ),
        "output head": head + 3 * CHUNK_BYTES + KEPT_BYTES,
    }
    return _present(device), _present({"optimizer": optimizer if train.offload_optimizer else 0})


def engine_memory(shape: ModelShape, cluster: ClusterSettings) -> dict[str, int]:
    """Bytes of a rollout engine on each of its devices."""
    width, devices = BYTES[cluster.dtype], cluster.tensor_parallel
    of_token = 2 * shape.hidden + (shape.queries + 2 * shape.keys + 3 * shape.intermediate) // devices
    return {
        "weights": shape.parameters * width // devices,
        "key-value cache": cluster.kv_cache_mib * 2**20,
        "activations": PREFILL_TOKENS * of_token * width,
        "sampling": cluster.rollout_sequences * shape.vocabulary * 4 * 3,  # logits, noise, probabilities
    }


def _low_rank_parameters(shape: ModelShape, train: TrainSettings) -> int:
    """Of the low-rank weights beside the named linear layers."""
    assert train.low_rank is not None
    to_queries, to_keys = shape.hidden + shape.queries, shape.hidden + shape.keys
    to_inner = shape.hidden + shape.intermediate
    widths = {
        "q_proj": to_queries, "o_proj": to_queries, "k_proj": to_keys, "v_proj": to_keys, "gate_proj": to_inner,
        "up_proj": to_inner, "down_proj": to_inner,
    }  # fmt: skip
    return shape.layers * train.low_rank.rank * sum(widths.get(name, 0) for name in train.low_rank.modules)


def _present(parts: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}
