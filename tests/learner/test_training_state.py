"""States are read only where every byte is the run's own; low-rank weights merge into a plain checkpoint."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from item_index.input_error import InputError
from learner.low_rank import LowRankSettings, add_low_rank_weights, merged_weights, without_low_rank_weights
from learner.packed_attention import PACKED
from learner.packing import pack_rows
from learner.policy import Policy, load_language_model
from learner.training_state import check_training_state, save_training_state

SETTINGS = LowRankSettings(rank=2, alpha=4, dropout=0.0, modules=("q_proj", "down_proj"))


class Engine:
    """What a state asks of an engine besides DeepSpeed's own files, which `save_state` stands for here."""

    ranks = 2
    device = torch.device("cpu")

    def __init__(self, rank):
        self.rank = rank

    def save_state(self, folder):
        (folder / "state" / f"part-{self.rank}.pt").write_bytes(b"pickled" * (self.rank + 1))


@pytest.fixture
def state(tmp_path):
    """The parts of two ranks, each written into a folder of its own and then put together."""
    whole = tmp_path / "whole"
    for rank in range(2):
        part = tmp_path / str(rank)
        save_training_state(Engine(rank), part, {"step": 7})
        for file in part.rglob("*"):
            if file.is_file():
                target = whole / file.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    return whole


def test_a_whole_state_says_how_far_it_is(state):
    assert check_training_state(state, ranks=2) == {"step": 7}


def test_another_number_of_ranks_is_refused(state):
    with pytest.raises(InputError, match="of 2 ranks, and this run has 1"):
        check_training_state(state, ranks=1)


@pytest.mark.parametrize("name", ["state/part-0.pt", "state/part-1.pt", "random-1.safetensors", "manifest-1.json"])
def test_a_missing_file_is_named(state, name):
    (state / name).unlink()
    with pytest.raises(InputError) as caught:
        check_training_state(state, ranks=2)
    assert str(caught.value.file).endswith(name)


@pytest.mark.parametrize("name", ["state/part-0.pt", "random-0.safetensors", "manifest-0.json"])
def test_a_flipped_byte_is_found(state, name):
    content = bytearray((state / name).read_bytes())
    content[len(content) // 3] ^= 1
    (state / name).write_bytes(bytes(content))
    with pytest.raises(InputError):
        check_training_state(state, ranks=2)


def test_a_file_that_no_manifest_knows_is_refused(state):
    (state / "state" / "more.pt").write_bytes(b"run me")
    with pytest.raises(InputError, match="no manifest knows this file"):
        check_training_state(state, ranks=2)


def test_a_manifest_of_another_kind_is_refused(state):
    (state / "manifest-0.json").write_text(json.dumps(["not", "it"]))
    with pytest.raises(InputError, match="not a manifest"):
        check_training_state(state, ranks=2)


@pytest.mark.parametrize("tied", [False, True])
def test_low_rank_training_leaves_known_weights_and_merges_into_a_plain_checkpoint(tmp_path, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    before = load_language_model(tmp_path).state_dict()
    policy = Policy(add_low_rank_weights(load_language_model(tmp_path, attention=PACKED), SETTINGS, known_tokens=25))
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) < sum(weight.numel() for weight in policy.parameters()) / 4
    exempt = [weight for weight in trained if getattr(weight, "exempt_from_decay", False)]
    optimizer = torch.optim.AdamW(
        [
            {"params": exempt, "weight_decay": 0.0},
            {"params": [weight for weight in trained if all(weight is not other for other in exempt)]},
        ],
        lr=0.1,
    )
    batch = pack_rows([(np.array([1, 28, 3, 27]), np.ones(4, dtype=bool)), (np.array([5, 6]), np.ones(2, dtype=bool))])
    losses = []
    for _ in range(3):
        loss = -policy(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    weights = merged_weights(policy.language_model)
    merged = load_language_model(tmp_path)
    merged.load_state_dict(weights)
    after = merged.state_dict()
    assert after.keys() == before.keys(), "the structure of a plain checkpoint"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    lows = {f"model.layers.{layer}.{part}.weight" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")}
    assert changed == lows | {"model.embed_tokens.weight", "lm_head.weight"}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name][:25], after[name][:25]), "rows of known tokens keep their values"
    merged.set_attn_implementation(PACKED)
    with torch.inference_mode():
        torch.testing.assert_close(Policy(merged)(batch), policy(batch), rtol=0, atol=1e-5)
    with without_low_rank_weights(policy.language_model), torch.inference_mode():
        base = {name: before[name] for name in lows}
        merged.load_state_dict(base, strict=False)
        torch.testing.assert_close(Policy(merged)(batch), policy(batch), rtol=0, atol=1e-5)
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
