"""A tokenizer that a stage has saved is the one that AutoTokenizer loads, of whatever class."""

import json

import pytest
from transformers import AutoTokenizer

from curriculum.tokenizer import saved_tokenizer, train_tokenizer

TEXT = "Évidence: 20 items,  mostly drama 8\n"


@pytest.mark.parametrize("name", ["TokenizersBackend", "Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer"])
def test_the_saved_tokenizer_is_that_of_its_class(tiny, tmp_path, name):
    train_tokenizer(["drama and comedy"], tiny.index, vocabulary_size=300).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    saved, expected = saved_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(saved) is type(expected)
    assert saved.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    text = TEXT + "".join(level[0] for level in tiny.index.tokens())
    ids = expected(text)["input_ids"]
    assert saved(text)["input_ids"] == ids
    assert saved.decode(ids, skip_special_tokens=True) == expected.decode(ids, skip_special_tokens=True)
    messages = [{"role": "user", "content": text}]
    assert saved.apply_chat_template(messages, tokenize=False) == expected.apply_chat_template(messages, tokenize=False)
    assert (saved.pad_token, saved.eos_token) == (expected.pad_token, expected.eos_token)
