"""Answers of language models, kept by the hash of their question: what was answered once is never asked again.

Any process may write beside any other, a kill loses no answer that was written, and whoever asks reads the folder
afterwards. So one process, the jobs of a cluster and a run that resumes cannot differ.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from item_index.input_error import InputError
from item_index.text import clean_text


@dataclass(frozen=True)
class Answer:
    """What a language model said, and its cost in tokens as the server counted them; 0 where it did not."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a question has no answer: a reason that can be counted, and the message in full."""

    reason: str
    message: str


@dataclass(frozen=True)
class AskingReport:
    """What it took to ask some questions.

    Attributes:
        failures: by key of the question.
        calls: requests that were sent.
        retries: those of them that repeated an earlier one.
        prompt_tokens, completion_tokens: of all completions, those that could not be used included.
    """

    failures: dict[str, Failure] = field(default_factory=dict)
    calls: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: AskingReport) -> AskingReport:
        return AskingReport(
            self.failures | other.failures,
            self.calls + other.calls,
            self.retries + other.retries,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


# Asks (key, prompt) pairs, whose number is given, and leaves the answers in the cache folder.
Asker = Callable[[Iterable[tuple[str, str]], int, Path], AskingReport]


@dataclass(frozen=True)
class CollectedAnswers:
    """What became of Q questions.

    Attributes:
        outcomes: Q answers or failures; None where there was nothing to ask.
        cached: Q flags, whether the answer was in the cache before.
        cost: calls, retries, prompt_tokens and completion_tokens of now, and cached_prompt_tokens and
            cached_completion_tokens of the answers that were asked for earlier; equal questions count once.
        torn_lines: last lines of cache files that a kill had cut short; their questions were asked again.
    """

    outcomes: tuple[Answer | Failure | None, ...]
    cached: tuple[bool, ...]
    cost: dict[str, int]
    torn_lines: int

    @property
    def failures_by_reason(self) -> dict[str, int]:
        """How many of the Q questions failed, the most frequent reason first."""
        return dict(Counter(outcome.reason for outcome in self.outcomes if isinstance(outcome, Failure)).most_common())


def collect_answers(
    count: int, prompt_of: Callable[[int], str | None], key_of: Callable[[str], str], cache: Path, ask: Asker
) -> CollectedAnswers:
    """Answers to `count` questions: from the cache, and from `ask` where it lacks them; equal questions are asked once.

    Args:
        count: Q, the number of questions.
        prompt_of: the prompt of a question, None where there is nothing to ask; called again for what is missing, so
            that not all prompts are in memory at once.
        key_of: hash of all that shapes the answer to a prompt.
        cache: folder of all answers so far.
        ask: called once with what is missing, if anything is. Each of its keys must end as answer or as failure.
    """
    known, torn_lines = read_answers(cache)
    prompts = (prompt_of(number) for number in range(count))
    keys = [None if prompt is None else key_of(prompt) for prompt in prompts]
    first_number: dict[str, int] = {}
    for number, key in enumerate(keys):
        if key is not None and key not in known:
            first_number.setdefault(key, number)

    def missing() -> Iterator[tuple[str, str]]:
        for key, number in first_number.items():
            prompt = prompt_of(number)
            assert prompt is not None
            yield key, prompt

    report = ask(missing(), len(first_number), cache) if first_number else AskingReport()
    answers = read_answers(cache)[0] if first_number else known
    outcomes = tuple(None if key is None else answers.get(key) or report.failures[key] for key in keys)
    from_cache = [known[key] for key in dict.fromkeys(keys) if key is not None and key in known]
    cost = {
        "calls": report.calls,
        "retries": report.retries,
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.completion_tokens,
        "cached_prompt_tokens": sum(answer.prompt_tokens for answer in from_cache),
        "cached_completion_tokens": sum(answer.completion_tokens for answer in from_cache),
    }
    return CollectedAnswers(outcomes, tuple(key in known for key in keys), cost, torn_lines)


def usable_text(content: str, *, complete: bool, maximum_tokens: int) -> str | Failure:
    """The answer's text behind the model's thoughts, where it has any; a failure when it is cut off or blank.

    Args:
        content: all that the model wrote.
        complete: False when the limit of tokens ended it.
        maximum_tokens: that limit, for the message.
    """
    if not complete:
        return Failure("cut off", f"the answer breaks off after maximum_tokens = {maximum_tokens}")
    # Reasoning models behind a server that does not part thought and answer.
    text = content.rpartition("</think>")[2].strip()
    return text if clean_text(text) else Failure("blank", "the answer is blank")


class AnswerWriter:
    """Appends answers to a file of its own in the cache folder, so any number of processes may write at once.

    Each answer is one line of JSON, handed to the operating system before `write` returns: a killed process loses none,
    and at worst cuts its last line short.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{uuid.uuid4().hex}.jsonl"

    def __enter__(self) -> AnswerWriter:
        self._file = self._path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self._path.unlink()

    def write(self, key: str, answer: Answer) -> None:
        self._file.write(json.dumps({"key": key, **vars(answer)}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()


def read_answers(folder: Path) -> tuple[dict[str, Answer], int]:
    """All answers of the cache folder by key, and how many files end in a line that was cut short.

    Lines without numbers of tokens count as 0 tokens. Raises InputError that names file and line for any other line
    that is not an answer.
    """
    answers: dict[str, Answer] = {}
    torn_lines = 0
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as lines:
            for row, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    torn_lines += 1
                    continue
                try:
                    record = json.loads(line)
                    tokens = [int(record.get(name, 0)) for name in ("prompt_tokens", "completion_tokens")]
                    answers[record["key"]] = Answer(record["text"], *tokens)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise InputError(
                        f"the line is not an answer ({type(error).__name__})", file=path, row=row,
                        remedy="Remove the line, or the file: its questions are then asked again.",
                    ) from error  # fmt: skip
    return answers, torn_lines
