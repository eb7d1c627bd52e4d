import pytest
import torch
from tiny import TEXTS, make_index
from transformers import LlamaConfig, LlamaForCausalLM

from curriculum.tokenizer import add_index_tokens, load_tokenizer, train_tokenizer
from item_index.input_error import InputError
from item_index.semantic_ids import SemanticIdIndex
from item_index.tokens import SemanticIdTokens
from learner.policy import add_dropout, build_language_model, fit_vocabulary, load_language_model


def checkpoint_without_index_tokens(folder, *, tied, padding_rows=0):
    """A checkpoint as a user may name it: it knows another, smaller index."""
    tokenizer = train_tokenizer(TEXTS, make_index(items=6, level_sizes=(2, 2, 2, 1)), vocabulary_size=300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + padding_rows, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, head_dim=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding_rows", [0, 40])
def test_a_named_checkpoint_gets_distinct_rows_for_new_tokens_and_stays_tied(tmp_path, tied, padding_rows):
    known = checkpoint_without_index_tokens(tmp_path / "named", tied=tied, padding_rows=padding_rows)
    index = make_index()
    tokenizer = load_tokenizer(tmp_path / "named", index)
    model = load_language_model(tmp_path / "named")
    old = model.get_input_embeddings().weight.detach().clone()

    assert fit_vocabulary(model, tokenizer, known_tokens=known, seed=0) == len(tokenizer) - known > 0

    weight = model.get_input_embeddings().weight.detach()
    assert weight.shape[0] == max(len(tokenizer), known + padding_rows)
    assert torch.equal(weight[:known], old[:known])
    new = weight[known : len(tokenizer)]
    assert len(torch.unique(new, dim=0)) == len(new)
    spread = (new - old[:known].mean(dim=0)).abs().mean()
    assert 0 < spread < 0.3 * old[:known].std()
    head = model.get_output_embeddings().weight
    assert (head is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path / "fitted")
    again = load_language_model(tmp_path / "fitted")
    assert torch.equal(again.get_input_embeddings().weight, weight)
    assert torch.equal(again.get_output_embeddings().weight, head)
    tokens = SemanticIdTokens.of(tokenizer, index, vocabulary_size=weight.shape[0])
    assert max(int(level.max()) for level in tokens.code_tokens) < weight.shape[0]


def test_index_tokens_are_added_once_and_each_is_one_token(tmp_path):
    checkpoint_without_index_tokens(tmp_path, tied=True)
    index = make_index()
    tokenizer = load_tokenizer(tmp_path, index)
    assert add_index_tokens(tokenizer, index) == 0
    for row in range(len(index)):
        assert len(tokenizer(index.text(row), add_special_tokens=False)["input_ids"]) == index.lengths_I[row]


def test_a_tokenizer_without_the_index_tokens_is_named(tmp_path):
    checkpoint_without_index_tokens(tmp_path, tied=True)
    bare = load_tokenizer(tmp_path, make_index(items=6, level_sizes=(2, 2, 2, 1)))
    index: SemanticIdIndex = make_index()
    with pytest.raises(InputError, match=rf"lacks \d+ of the \d+ tokens of index {index.version}"):
        SemanticIdTokens.of(bare, index)


def test_a_missing_checkpoint_and_an_odd_width_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint folder"):
        load_language_model(tmp_path / "nowhere")
    tokenizer = train_tokenizer(TEXTS, make_index(), vocabulary_size=300)
    with pytest.raises(InputError, match="multiple of 32"):
        build_language_model(tokenizer, hidden_size=48, layers=1, intermediate_size=32, seed=0)


def test_a_model_from_scratch_is_fixed_by_its_seed():
    tokenizer = train_tokenizer(TEXTS, make_index(), vocabulary_size=300)
    first, second, other = (
        build_language_model(tokenizer, hidden_size=32, layers=1, intermediate_size=32, seed=seed).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_dropout_acts_in_training_alone_and_keeps_the_mean(tmp_path):
    checkpoint_without_index_tokens(tmp_path, tied=False)
    plain, dropped = load_language_model(tmp_path), load_language_model(tmp_path)
    add_dropout(dropped, 0.25)
    assert dropped.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.arange(12)[None]
    assert torch.equal(dropped.eval()(tokens).logits, plain.eval()(tokens).logits)

    dropped.train()
    layer = dropped.base_model.layers[0]
    seen = {}
    for name, module in (
        ("embedding", dropped.get_input_embeddings()),
        ("attention", layer.self_attn),
        ("mlp", layer.mlp),
    ):
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    torch.manual_seed(1)
    first = dropped(tokens).logits
    for output in seen.values():
        zeros = (output[0] if isinstance(output, tuple) else output).eq(0).float().mean()
        assert 0.15 < zeros < 0.35
    assert not torch.allclose(dropped(tokens).logits, first)
    embedded = torch.stack([dropped.get_input_embeddings()(tokens) for _ in range(2000)]).mean(0)
    assert torch.allclose(embedded, plain.get_input_embeddings()(tokens), atol=0.01)
    torch.manual_seed(1)
    assert torch.equal(dropped(tokens).logits, first)


def test_dropout_needs_blocks_that_it_knows():
    with pytest.raises(InputError, match=r"sft.dropout.*no self_attn and mlp"):
        add_dropout(torch.nn.Sequential(torch.nn.Linear(2, 2)), 0.1)
