"""Prompts put together from token ids against the chat template's text tokenised whole, and responses read back."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.prompts import SYSTEM_PROMPTS, PromptBuilder
from curriculum.reasoning import MetadataTeacher, ReasoningTrace
from item_index.catalogue import Catalogue
from item_index.input_error import InputError
from item_index.ragged import RaggedArray
from item_index.text import clean_text
from item_index.tokens import THINK_OPEN
from rewards.answer import parse_answer

HISTORIES = [[3], [5, 30, 31, 9], list(range(20)), list(range(31, 4, -1))]
KINDS = ["Drama", "Comedy", "Horror", "Western", "Sci-Fi"]


@pytest.fixture(scope="module")
def catalogue(tiny):
    rows = range(len(tiny.index))
    return Catalogue(
        item_ids=tiny.index.item_ids,
        titles=tuple(f"Tale number {row}" for row in rows),
        descriptions=("",) * len(rows),
        categories=tuple((KINDS[row % 5], KINDS[row // 2 % 5]) for row in rows),
        brands=tuple("Acme" if row % 3 else "" for row in rows),
    )


def builder_with_template(tiny, template):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = template
    return PromptBuilder(tokenizer, tiny.index, tiny.constraint.tokens)


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
@pytest.mark.parametrize("history", HISTORIES)
def test_a_prompt_is_the_chat_templates_text_tokenised_whole(tiny, history, mode):
    shown = "".join(tiny.index.text(item) for item in history[-20:])
    messages = [{"role": "system", "content": SYSTEM_PROMPTS[mode]}, {"role": "user", "content": shown}]
    text = tiny.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text += THINK_OPEN if mode == "reasoning" else ""
    prompt = tiny.builder.prompt(np.array(history), mode)
    assert prompt == tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt == tiny.builder.prompt(history, mode)
    start = tiny.builder.history_start(mode)
    spelled = [token for item in history[-20:] for token in tiny.builder.item_tokens[item]]
    assert prompt[start : start + len(spelled)] == spelled


def test_the_modes_have_prompts_of_their_own(tiny):
    assert tiny.builder.prompt([1], "direct") != tiny.builder.prompt([1], "reasoning")
    assert tiny.builder.prompt([1], "reasoning")[-1] == tiny.constraint.tokens.think_open


def test_a_history_is_cut_to_its_latest_items(tiny):
    short = PromptBuilder(tiny.tokenizer, tiny.index, tiny.constraint.tokens, history_items=3)
    assert short.prompt([1, 2, 3, 4, 5], "direct") == short.prompt([3, 4, 5], "direct")


def test_other_templates_and_tokenizers_without_one_are_used_as_they_are(tiny):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    builder = builder_with_template(tiny, template)
    text = f"[system] {SYSTEM_PROMPTS['direct']}\n[user] {tiny.index.text(1)}{tiny.index.text(2)}\n"
    assert builder.prompt([1, 2], "direct") == tiny.tokenizer(text, add_special_tokens=False)["input_ids"]

    plain = builder_with_template(tiny, None)
    text = f"{SYSTEM_PROMPTS['reasoning']}\n{tiny.index.text(1)}\n{THINK_OPEN}"
    assert plain.prompt([1], "reasoning") == tiny.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}", None]
)
def test_a_message_of_words_and_semantic_ids_is_rendered_in_the_chat_template(tiny, template):
    builder = builder_with_template(tiny, template)
    message = f"After {tiny.index.text(5)}{tiny.index.text(30)}, what is next?\nOne item."
    prompt = builder.message_prompt("Be brief.", message)
    expected = f"<system> Be brief.\n<user> {message}\n" if template else f"Be brief.\n{message}\n"
    assert tiny.tokenizer.decode(prompt) == expected
    spelled = [*builder.item_tokens[5], *builder.item_tokens[30]]
    start = prompt.index(spelled[0])
    assert prompt[start : start + len(spelled)] == spelled


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_a_history_as_message_is_the_prompt_of_its_mode(tiny, mode):
    message = "".join(tiny.index.text(item) for item in [3, 5, 30])
    prompt = tiny.builder.message_prompt(SYSTEM_PROMPTS[mode], message)
    think = [tiny.constraint.tokens.think_open] if mode == "reasoning" else []
    assert [*prompt, *think] == tiny.builder.prompt([3, 5, 30], mode)


@given(text=st.text(alphabet="ab żć€😀.12", max_size=60).map(clean_text).filter(bool), maximum=st.integers(1, 12))
def test_a_cut_text_is_the_beginning_in_whole_characters(tiny, text, maximum):
    cut = tiny.builder.cut_text(text, maximum)
    tokens = tiny.tokenizer(text)["input_ids"]
    assert cut
    assert text.startswith(cut)
    if len(tokens) <= maximum:
        assert cut == text
    else:
        kept = tiny.tokenizer(cut)["input_ids"]
        assert len(kept) <= maximum or len(cut) == 1
        # What the first tokens spell, less the bytes of an incomplete character and the space at the end.
        spelled = tiny.tokenizer.decode(tokens[:maximum])
        assert cut.startswith(spelled.removesuffix("\N{REPLACEMENT CHARACTER}").rstrip())


@pytest.mark.parametrize("template", ["Hello", "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}"])
def test_a_template_that_does_not_show_the_history_once_is_an_input_error(tiny, template):
    with pytest.raises(InputError, match=r"chat_template.*exactly once"):
        builder_with_template(tiny, template)


@pytest.mark.parametrize("target", [0, 5, 7, 30])
def test_a_reasoning_response_reads_back_as_a_well_formed_answer(tiny, catalogue, target):
    history = [1, 4, 8, 5, 30, 2, 11]
    trace = ReasoningTrace(MetadataTeacher(catalogue).steps(history, target), (4, 5, 2), removed=4)
    think, rewriting = trace.render(tiny.index.text)
    response = tiny.builder.reasoning_response(think, rewriting, target)
    answer = parse_answer(response, mode="reasoning", special=tiny.constraint.tokens, decode=tiny.tokenizer.decode)
    assert answer.problem == ""
    assert answer.well_formed
    assert list(answer.codes) == tiny.index.codes_IL[target][: tiny.index.lengths_I[target]].tolist()
    text = tiny.tokenizer.decode(response)
    assert text == f"{think}</think>{rewriting}<answer>{tiny.index.text(target)}</answer><|end|>"
    assert tiny.tokenizer(text, add_special_tokens=False)["input_ids"] == response


@pytest.mark.parametrize("target", [0, 5, 7, 30])
def test_a_direct_response_reads_back_as_the_item(tiny, target):
    response = tiny.builder.direct_response(target)
    answer = parse_answer(response, mode="direct", special=tiny.constraint.tokens, decode=tiny.tokenizer.decode)
    assert answer.well_formed
    assert tiny.tokenizer.decode(response) == f"{tiny.index.text(target)}<|end|>"


@pytest.mark.parametrize("target", [0, 5, 7, 30])
def test_what_is_taught_is_allowed_by_the_constraint_under_which_it_is_sampled(tiny, catalogue, target):
    trace = ReasoningTrace(MetadataTeacher(catalogue).steps([1, 4, 8, 5, 30], target), (1, 5, 30), removed=2)
    think, rewriting = trace.render(tiny.index.text)
    reasoning = tiny.builder.reasoning_response(think, rewriting, target)
    direct = tiny.builder.direct_response(target)
    states = tiny.constraint.start(
        ["reasoning", "direct"], [len(reasoning) + tiny.constraint.closing_length, tiny.index.depth + 1]
    )
    tiny.constraint.scan(RaggedArray.of([reasoning, direct], np.int32), states)
    assert not states.forced.any()
