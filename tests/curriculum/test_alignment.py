"""Alignment rows read back as text: what each task asks and answers, for which examples, and how often."""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from string import Formatter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum.alignment import TASKS, AlignmentData, alignment_rows, alignment_texts, availability, row_counts
from curriculum.interactions import UserSequences
from curriculum.prompts import SYSTEM_PROMPTS, PromptBuilder
from curriculum.rows import UserText
from curriculum.templates import ALIGNMENT_SYSTEM_PROMPT, TEMPLATES
from item_index.catalogue import Catalogue

HISTORY = 3
TASK = {task.name: task for task in TASKS}
OF_ITEMS = {"item_to_index", "index_to_item"}
# Users without an item in common: an item then tells the place in the sequences that it comes from.
LENGTHS = (3, 4, 9, 14)
NO_DESCRIPTION, MARKUP_TITLE = {4, 6, 20}, 17


@dataclass(frozen=True)
class Share:
    weight: float = 1.0
    cap: int | None = None


ALL = {name: Share() for name in TASK}


@pytest.fixture(scope="module")
def data(tiny):
    """All users' places have a text; preferences are blank at every fifth place, queries at every third."""
    items = len(tiny.index)
    catalogue = Catalogue(
        item_ids=tiny.index.item_ids,
        titles=tuple("<b></b>" if row == MARKUP_TITLE else f"Tale &amp; song {row:02d}" for row in range(items)),
        descriptions=tuple("" if row in NO_DESCRIPTION else f"About <i>matter</i> {row:02d}." for row in range(items)),
        categories=((),) * items,
        brands=("",) * items,
    )
    total = sum(LENGTHS)
    sequences = UserSequences(
        user_ids=tuple(range(len(LENGTHS))),
        offsets_U1=np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64),
        items=np.arange(total) % items,
        timestamps=np.arange(total),
    )
    held_out = np.zeros(total, dtype=bool)
    held_out[[10, 19, 22]] = True
    user_texts = [
        UserText(at, " " if at % 5 == 0 else f"Likes <b>kind</b> {at:02d}", "" if at % 3 == 0 else f"Want one {at:02d}")
        for at in range(total)
    ]
    builder = PromptBuilder(tiny.tokenizer, tiny.index, tiny.constraint.tokens, history_items=HISTORY)
    return AlignmentData(catalogue, sequences, held_out, builder, user_texts)


def allowed_targets(data):
    """Places that rows may teach, user by user: not the first, not held out, not the last two."""
    places, start = [], 0
    for length in LENGTHS:
        places += [at for at in range(start + 1, start + length - 2) if not data.held_out[at]]
        start += length
    return places


def read(data, row):
    """(prompt, learnt response) as text."""
    tokens, learnt = row
    assert tokens.dtype == np.int32
    assert learnt.dtype == bool
    assert tokens.shape == learnt.shape
    first = int(np.argmax(learnt))
    assert first > 0
    assert learnt.tolist() == [False] * first + [True] * (len(tokens) - first), "the response alone is learnt"
    decode = data.builder.tokenizer.decode
    return decode(tokens[:first].tolist()), decode(tokens[first:].tolist())


def sid(data, *items):
    return "".join(data.builder.index.text(item) for item in items)


def expected_rows(data, task, variant, system, filled, answer):
    """Every prompt that the templates allow, with the answer."""
    found = set()
    for template in TEMPLATES[task][variant]:
        message = template
        for name, text in filled.items():
            message = message.replace(f"{{{name}}}", text)
        found.add((f"<|system|>{system}<|user|>{message}<|assistant|>", f"{answer}<|end|>"))
    return found


HISTORY_OF_26 = (23, 24, 25)
TITLES_OF_26 = "1. Tale & song 23\n2. Tale & song 24\n3. Tale & song 25"


def cases(data):
    """Task, example, and per variant what is filled in and what is answered. Place 26 follows items 23, 24 and 25;
    place 8 is the second of its user."""
    history = {"history": sid(data, *HISTORY_OF_26)}
    likes, want = {"preference": "Likes kind 26"}, {"query": "Want one 26"}
    title, text = "Tale & song 03", "About matter 03."
    yield "next_title", 26, {"history": (history, "Tale & song 26")}
    yield "next_title", 8, {"history": ({"history": sid(data, 7)}, "Tale & song 08")}
    yield "next_description", 26, {"history": (history, "About matter 26.")}
    yield "titles_to_item", 26, {"titles": ({"titles": TITLES_OF_26}, sid(data, 26))}
    yield "titles_to_item", 8, {"titles": ({"titles": "1. Tale & song 07"}, sid(data, 8))}
    yield (
        "item_to_index",
        3,
        {
            "title": ({"title": title}, sid(data, 3)),
            "description": ({"description": text}, sid(data, 3)),
            "title+description": ({"title": title, "description": text}, sid(data, 3)),
        },
    )
    yield "item_to_index", 4, {"title": ({"title": "Tale & song 04"}, sid(data, 4))}
    yield "item_to_index", 17, {"description": ({"description": "About matter 17."}, sid(data, 17))}
    yield (
        "index_to_item",
        3,
        {
            "title": ({"item": sid(data, 3)}, title),
            "description": ({"item": sid(data, 3)}, text),
            "title+description": ({"item": sid(data, 3)}, f"{title}\n{text}"),
        },
    )
    yield "index_to_item", 4, {"title": ({"item": sid(data, 4)}, "Tale & song 04")}
    yield (
        "item_search",
        26,
        {
            "preference": (likes, sid(data, 26)),
            "query": (want, sid(data, 26)),
            "preference+query": (likes | want, sid(data, 26)),
            "history+preference": (history | likes, sid(data, 26)),
            "history+query": (history | want, sid(data, 26)),
            "history+preference+query": (history | likes | want, sid(data, 26)),
        },
    )
    yield (
        "item_search",
        25,
        {
            "query": ({"query": "Want one 25"}, sid(data, 25)),
            "history+query": ({"query": "Want one 25", "history": sid(data, 22, 23, 24)}, sid(data, 25)),
        },
    )
    yield "preference_obtain", 26, {"history": (history, "Likes kind 26")}


def test_the_tasks_ask_and_answer_exactly_this_in_every_variant_and_template(data):
    seen = set()
    for name, example, variants in cases(data):
        expected = set()
        for variant, (filled, answer) in variants.items():
            expected |= expected_rows(data, name, variant, ALIGNMENT_SYSTEM_PROMPT, filled, answer)
            seen.add((name, variant))
        generator = np.random.default_rng(0)
        draws = 12 * len(expected)  # one of n templates stays unseen with a chance of e^-12
        assert {read(data, TASK[name].row(data, example, generator)) for _ in range(draws)} == expected
    assert seen | {("next_item", "history")} == {(name, variant) for name in TEMPLATES for variant in TEMPLATES[name]}


def test_next_item_is_the_prompt_of_direct_mode_or_drawn_among_templates(data):
    generator = np.random.default_rng(0)
    tokens, learnt = TASK["next_item"].row(data, 26, generator)
    prompt = data.builder.prompt(HISTORY_OF_26, "direct")
    assert tokens.tolist() == [*prompt, *data.builder.direct_response(26)]
    assert learnt.tolist() == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))

    varied = replace(data, next_item_templates=True)
    expected = expected_rows(
        data, "next_item", "history", SYSTEM_PROMPTS["direct"], {"history": sid(data, *HISTORY_OF_26)}, sid(data, 26)
    )
    rows = {read(varied, TASK["next_item"].row(varied, 26, generator)) for _ in range(200)}
    assert rows == expected
    assert read(data, (tokens, learnt)) in expected


def test_examples_are_the_train_targets_with_their_texts_and_the_items(data):
    targets = allowed_targets(data)
    items = range(len(data.catalogue))
    assert 17 in targets
    assert not set(targets) & {10, 19, 22}
    expected = {
        "next_item": targets,
        "next_title": [at for at in targets if at != MARKUP_TITLE],
        "next_description": [at for at in targets if at not in NO_DESCRIPTION],
        "titles_to_item": [at for at in targets if at - MARKUP_TITLE not in range(1, HISTORY + 1)],
        "item_to_index": list(items),
        "index_to_item": list(items),
        "item_search": [at for at in targets if at % 5 or at % 3],
        "preference_obtain": [at for at in targets if at % 5],
    }
    assert {name: task.places(data).tolist() for name, task in TASK.items()} == expected

    texts = {
        "title": len(items) - 1,
        "description": len(items) - len(NO_DESCRIPTION),
        "title+description": len(items) - len(NO_DESCRIPTION) - 1,
    }
    wanted = {
        "preference": sum(at % 5 > 0 for at in targets),
        "query": sum(at % 3 > 0 for at in targets),
        "preference+query": sum(at % 5 > 0 and at % 3 > 0 for at in targets),
    }
    counts = availability(data)
    assert counts["item_to_index"] == counts["index_to_item"] == texts
    assert counts["item_search"] == wanted | {f"history+{name}": count for name, count in wanted.items()}
    for name in ("next_item", "next_title", "next_description", "titles_to_item", "preference_obtain"):
        assert list(counts[name].values()) == [len(expected[name])]


def test_without_descriptions_and_user_texts_their_tasks_have_no_rows(data):
    bare = replace(data, user_texts=(), catalogue=replace(data.catalogue, descriptions=("",) * len(data.catalogue)))
    counts = availability(bare)
    assert counts["next_description"] == counts["preference_obtain"] == {"history": 0}
    assert set(counts["item_search"].values()) == {0}
    names = Counter(name for name, _ in alignment_rows(bare, {name: Share(2.0) for name in TASK}, seed=0, number=0))
    assert set(names) == set(TASK) - {"next_description", "preference_obtain", "item_search"}


@pytest.mark.parametrize("templates", [False, True])
def test_no_row_shows_validation_or_test_items_and_none_teaches_a_held_out_target(data, templates):
    varied = replace(data, next_item_templates=templates)
    targets = set(allowed_targets(data))
    ends = np.cumsum(LENGTHS)
    never = {int(end) - back for end in ends for back in (1, 2)}
    spelled = {item: sid(data, item) for item in range(sum(LENGTHS))}
    taught, in_histories = defaultdict(set), set()
    for number in range(3):
        for name, row in alignment_rows(varied, {name: Share(2.0) for name in TASK}, seed=0, number=number):
            prompt, response = read(varied, row)
            assert response != "<|end|>"
            if name in OF_ITEMS:
                continue
            for item in never:
                assert f"{item:02d}" not in prompt + response, "titles, descriptions and user texts carry their number"
            items = items_of(varied, row)
            assert not items & never
            for item in targets | {10, 19, 22}:
                if f"{item:02d}" in response or response == f"{spelled[item]}<|end|>":
                    taught[name].add(item)
                elif item in items:
                    in_histories.add(item)
    assert {name: sorted(items) for name, items in taught.items()} == {
        name: TASK[name].places(varied).tolist() for name in TASK if name not in OF_ITEMS
    }
    assert {10, 19, 22} <= in_histories


def items_of(data, row):
    """The items whose semantic IDs stand in a row, token by token."""
    item_of_codes = {tuple(tokens): item for item, tokens in enumerate(data.builder.item_tokens)}
    levels = data.builder.tokens.level_of_token[row[0]]
    found, spelled = set(), []
    for token, level in zip([*row[0].tolist(), -1], [*levels, -1], strict=True):
        if spelled and level <= 0:
            found.add(item_of_codes[tuple(spelled)])
            spelled = []
        if level >= 0:
            spelled.append(token)
    return found


shares = st.builds(Share, st.floats(0, 3), st.none() | st.integers(0, 60))


@settings(max_examples=30)
@given(tasks=st.dictionaries(st.sampled_from(sorted(TASK)), shares), seed=st.integers(0, 9), number=st.integers(0, 9))
def test_weights_and_caps_decide_how_many_rows_a_task_has(data, tasks, seed, number):
    rows = Counter(name for name, _ in alignment_rows(data, tasks, seed=seed, number=number))
    expected = {}
    for name, share in tasks.items():
        wanted = round(share.weight * len(TASK[name].places(data)))
        expected[name] = wanted if share.cap is None else min(wanted, share.cap)
    assert row_counts(data, tasks) == expected
    assert dict(rows) == {name: count for name, count in expected.items() if count}


@settings(max_examples=30)
@given(share=shares, seed=st.integers(0, 99))
def test_examples_are_repeated_as_evenly_as_can_be(data, share, seed):
    tasks = {"item_to_index": share}
    answers = Counter(read(data, row)[1] for _, row in alignment_rows(data, tasks, seed=seed, number=0))
    whole, more = divmod(row_counts(data, tasks)["item_to_index"], len(data.catalogue))
    times = Counter(answers[f"{sid(data, item)}<|end|>"] for item in range(len(data.catalogue)))
    assert +times == +Counter({whole: len(data.catalogue) - more, whole + 1: more})


def in_bytes(rows):
    return [(name, tokens.tobytes(), learnt.tobytes()) for name, (tokens, learnt) in rows]


def test_a_pass_depends_on_seed_and_number_and_on_nothing_else(data):
    first = in_bytes(alignment_rows(data, ALL, seed=3, number=1))
    assert in_bytes(alignment_rows(data, dict(reversed(ALL.items())), seed=3, number=1)) == first
    assert in_bytes(alignment_rows(replace(data), ALL, seed=3, number=1)) == first
    for seed, number in ((3, 0), (3, 2), (4, 1)):
        other = in_bytes(alignment_rows(data, ALL, seed=seed, number=number))
        assert [name for name, *_ in other] != [name for name, *_ in first], "the order is drawn anew"
        assert Counter(name for name, *_ in other) == Counter(name for name, *_ in first)
        assert len(set(other) - set(first)) > len(first) / 2, "and so are variants and templates"
    turns = sum(one[0] != next_one[0] for one, next_one in pairwise(first))
    assert turns > len(first) / 2, "the tasks are shuffled together"


def test_a_tasks_rows_do_not_depend_on_the_other_tasks(data):
    alone = in_bytes(alignment_rows(data, {"item_search": Share(0.8)}, seed=0, number=0))
    among = in_bytes(alignment_rows(data, ALL | {"item_search": Share(0.8)}, seed=0, number=0))
    assert [row for row in among if row[0] == "item_search"] == alone


def test_samples_are_drawn_anew_for_each_pass(data):
    tasks = {"next_item": Share(0.3)}
    passes = [in_bytes(alignment_rows(data, tasks, seed=0, number=number)) for number in range(30)]
    assert len({frozenset(rows) for rows in passes}) > 1
    assert len(set().union(*passes)) == len(TASK["next_item"].places(data)), "and all examples have their turn"


def test_long_text_is_cut_to_the_limit_and_never_blanked(data):
    long = replace(
        data.catalogue,
        titles=tuple(f"{row} long title {'ab ' * 30}" for row in range(len(data.catalogue))),
        descriptions=tuple("żółć " * 40 if row % 2 else "x" for row in range(len(data.catalogue))),
    )
    texts = [UserText(26, "likes " * 50, "wants " * 50)]
    for limit in (1, 2, 7, 40):
        cut = replace(data, catalogue=long, user_texts=texts, maximum_text_tokens=limit)
        for written, original in (
            (cut.titles, long.titles),
            (cut.descriptions, long.descriptions),
            (cut.preferences, ["likes " * 50]),
            (cut.queries, ["wants " * 50]),
        ):
            for short, whole in zip(written, original, strict=True):
                assert short
                assert whole.startswith(short)
                tokens = len(data.builder.tokenizer(short)["input_ids"])
                assert tokens <= limit or len(short) == 1
        generator = np.random.default_rng(0)
        _, response = read(cut, TASK["index_to_item"].row(cut, 1, generator))
        assert "\N{REPLACEMENT CHARACTER}" not in response
        _, learnt = TASK["next_title"].row(cut, 26, generator)
        assert learnt.sum() == limit + 1, "the cut title and the end of sequence"
        for task in TASKS:
            assert all(all(task.asked(cut, int(place)).values()) for place in task.places(cut))


def test_text_from_outside_cannot_spell_tokens(data):
    titles = tuple(f"Tale {row} <|a_0|><think><|end|>" for row in range(len(data.catalogue)))
    marked = replace(data, catalogue=replace(data.catalogue, titles=titles))
    prompt, response = read(marked, TASK["next_title"].row(marked, 26, np.random.default_rng(0)))
    assert response == "Tale 26<|end|>"
    prompt, _ = read(marked, TASK["titles_to_item"].row(marked, 26, np.random.default_rng(0)))
    assert "Tale 23" in prompt
    assert "<think>" not in prompt
    assert "<|a_0|>" not in prompt


def placeholders(template):
    return [name for _, name, *_ in Formatter().parse(template) if name is not None]


def test_every_variant_has_ten_to_twenty_templates_with_exactly_its_placeholders(data):
    assert list(TEMPLATES) == list(TASK)
    every = []
    for name, variants in TEMPLATES.items():
        assert set(variants) == set(data.available[name])
        for variant, templates in variants.items():
            assert 10 <= len(templates) <= 20, (name, variant)
            expected = ["item"] if name == "index_to_item" else variant.split("+")
            for template in templates:
                assert sorted(placeholders(template)) == sorted(expected), template
                assert template == template.strip()
                assert template.isascii()
            every += templates
    assert len({template.casefold() for template in every}) == len(every)
    assert TEMPLATES["next_item"]["history"][0] == "{history}"


def test_a_tokenizer_of_ones_own_gets_all_words_of_the_rows(data):
    texts = list(alignment_texts(data.catalogue, data.user_texts))
    assert not [text for text in texts if "{" in text or "<" in text]
    assert ALIGNMENT_SYSTEM_PROMPT in texts
    assert {"Tale & song 03", "About matter 03.", "Likes kind 26", "Want one 26"} <= set(texts)
    known = " ".join(texts)
    for name, row in alignment_rows(data, ALL, seed=0, number=0):
        if name == "next_item":
            continue
        prompt, response = read(data, row)
        words = prompt.replace("<|", " <|").replace("|>", "|> ").split() + response.replace("<|", " <|").split()
        for word in words:
            plain = word.strip('".,:;?!')
            assert "|" in word or plain in known or plain.isdigit(), word


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"held_out": np.zeros(3, dtype=bool)}, r"held_out has shape \(3,\)"),
        ({"maximum_text_tokens": 0}, "maximum_text_tokens must be at least 1"),
        ({"user_texts": [UserText(30, "a", "b")]}, "a user text is at place 30 of 30"),
        ({"user_texts": [UserText(-1, "a", "b")]}, "a user text is at place -1 of 30"),
    ],
)
def test_data_that_does_not_belong_together_is_refused(data, changed, message):
    with pytest.raises(ValueError, match=message):
        replace(data, **changed)


def test_a_catalogue_of_other_items_than_the_indexs_is_refused(data):
    with pytest.raises(ValueError, match="the catalogue's items are not those of the index"):
        replace(data, catalogue=data.catalogue.select(np.arange(30)))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"next_itme": Share()}, "no alignment task 'next_itme', only next_item, next_title"),
        ({"next_item": Share(-1)}, "'next_item' has weight -1"),
        ({"next_item": Share(1, -2)}, "cap -2"),
    ],
)
def test_unknown_tasks_and_negative_shares_are_refused_before_any_row_is_taken(data, tasks, message):
    with pytest.raises(ValueError, match=message):
        alignment_rows(data, tasks, seed=0, number=0)
