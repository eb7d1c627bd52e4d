"""Estimated memory against what is really allocated on small models."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cluster.memory_estimate import KNOWN_MODELS, ModelShape, engine_memory, learner_memory
from cluster.settings import load_settings
from item_index.input_error import InputError
from learner.packed_attention import PACKED
from learner.packing import pack_groups
from learner.policy import Policy

SMALL = {
    "vocab_size": 64, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "attn_implementation": PACKED,
}  # fmt: skip


def models():
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL)), "qwen3": Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    }  # fmt: skip


def kept_bytes(model, packed):
    """What autograd keeps of a forward pass: every storage once, parameters not."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Policy(model).train()(packed).sum()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_activations_are_those_that_autograd_keeps(kind, dtype):
    model = models()[kind].to(dtype)
    generator = np.random.default_rng(0)

    def tokens(count):
        return generator.integers(0, 64, count).astype(np.int32)

    groups = [(tokens(200), [tokens(100) for _ in range(4)]) for _ in range(4)]
    packed = pack_groups(groups)
    shape, length = ModelShape.of(model.config), packed.input_ids.numel()
    estimate = shape.activation_bytes(length, dtype.itemsize, checkpointing=False)
    assert kept_bytes(model, packed) == pytest.approx(estimate, rel=0.15)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with_one_layer = shape.activation_bytes(length, dtype.itemsize, checkpointing=True)
    assert kept_bytes(model, packed) == pytest.approx(
        with_one_layer - length * shape.layer_bytes(dtype.itemsize), rel=0.15
    )


def test_shapes_have_the_parameters_that_the_models_are_known_for():
    millions = {name: ModelShape.of_checkpoint(f"models/{name}").parameters / 1e6 for name in KNOWN_MODELS}
    assert millions == pytest.approx(
        {"Qwen3-0.6B": 596, "Qwen3-1.7B": 1721, "Qwen3-4B": 4022, "Qwen3-8B": 8191, "SmolLM2-135M": 134.5}, rel=1e-3
    )
    with pytest.raises(InputError, match=r"none of the known models Qwen3-0\.6B"):
        ModelShape.of_checkpoint("models/another")


def test_a_checkpoint_folder_has_its_own_shape(tmp_path):
    model = models()["llama"]
    model.save_pretrained(tmp_path / "Qwen3-4B")
    shape = ModelShape.of_checkpoint(str(tmp_path / "Qwen3-4B"))
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert (shape.hidden, shape.queries, shape.keys, shape.normed_heads) == (192, 256, 128, False)


def parts(*overrides):
    settings = load_settings(None, ["train.zero_stage=2", "train.ranks=4", *overrides])
    return learner_memory(ModelShape.of_checkpoint("Qwen3-0.6B"), settings.train)


def test_stages_ranks_types_and_low_rank_weights_change_what_a_rank_holds():
    parameters = ModelShape.of_checkpoint("Qwen3-0.6B").parameters
    device, host = parts("train.dtype=bfloat16")
    assert host == {}
    assert device["weights"] == device["reference"] == 2 * parameters
    assert device["gradients"] == 2 * parameters // 4
    assert device["optimizer"] == 16 * parameters // 4
    whole, _ = parts("train.zero_stage=0")
    assert (whole["gradients"], whole["optimizer"]) == (4 * parameters, 8 * parameters)
    third, _ = parts("train.zero_stage=3", "train.dtype=bfloat16")
    assert third["weights"] == 2 * parameters // 4
    offloaded, on_host = parts("train.offload_optimizer=true", "train.dtype=bfloat16")
    assert "optimizer" not in offloaded
    assert on_host["optimizer"] == device["optimizer"]
    low_rank, _ = parts("train.low_rank={rank: 8}", "train.dtype=bfloat16")
    assert "reference" not in low_rank
    assert low_rank["optimizer"] < device["optimizer"] / 50


def test_an_engine_on_several_devices_has_a_part_of_the_weights_on_each():
    shape = ModelShape.of_checkpoint("Qwen3-0.6B")
    one, two = (
        engine_memory(shape, load_settings(None, [f"cluster.tensor_parallel={devices}"]).cluster) for devices in (1, 2)
    )
    assert one["weights"] == 2 * two["weights"] == 4 * shape.parameters
    assert one["key-value cache"] == 256 * 2**20
