"""A client of OpenAI-compatible chat endpoints for many questions: limits, deadlines, retries, counted failures."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    DefaultAsyncHttpxClient,
    NotFoundError,
    OpenAIError,
    RateLimitError,
)

from item_index.answer_cache import Answer, AnswerWriter, AskingReport, Failure, usable_text
from item_index.input_error import InputError


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint for chat completions, what it is told, and how hard it may be worked.

    Attributes:
        url: base URL, such as http://host:8000/v1.
        model: name of the model there.
        key: the secret; not shown, and to be kept out of settings and logs.
        instruction: the system message of every request.
        section: section of the settings that names the endpoint, for messages.
        concurrency: requests that are under way at once.
        attempt_seconds: deadline of one attempt.
        deadline_seconds: deadline of one question: all attempts and the waits between them.
        retries: attempts after the first. The client waits as long as Retry-After says, else longer each time.
        maximum_tokens: of an answer.
        temperature: None leaves it to the endpoint.
        failures_in_a_row: after so many the endpoint counts as down.
    """

    url: str
    model: str
    key: str = field(repr=False)
    instruction: str = field(repr=False)
    section: str
    concurrency: int = 16
    attempt_seconds: float = 60.0
    deadline_seconds: float = 300.0
    retries: int = 5
    maximum_tokens: int = 256
    temperature: float | None = 0.0
    failures_in_a_row: int = 100

    def cache_key(self, prompt: str) -> str:
        """SHA-256 (hex) of everything that shapes the answer: model, instruction, prompt, limits."""
        request = [self.model, self.instruction, prompt, self.maximum_tokens, self.temperature]
        return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def ask_endpoint(
    endpoint: Endpoint, questions: Iterable[tuple[str, str]], cache: Path, progressed: Callable[[], None]
) -> AskingReport:
    """Ask all (key, prompt) pairs, `concurrency` at a time; each answer is on disk before the next question is taken.

    Failures are reported by key. Raises InputError for a refused key (401), an unknown model or path (404), and an
    endpoint that fails `failures_in_a_row` times in a row: then no further question can succeed.
    """
    tally = _Tally()

    async def run() -> None:
        waiting = iter(questions)
        in_a_row = 0

        async def worker() -> None:
            nonlocal in_a_row
            for key, prompt in waiting:
                try:
                    async with asyncio.timeout(endpoint.deadline_seconds):
                        outcome = await _ask(client, endpoint, prompt, tally)
                except TimeoutError:
                    outcome = Failure("deadline", f"no answer within {endpoint.deadline_seconds:g} s")
                except (AuthenticationError, NotFoundError) as error:
                    raise InputError(
                        f"the endpoint {endpoint.url} refuses every request ({_shown(error, endpoint)})",
                        field=endpoint.section,
                        remedy="Check url, model and the key in the environment variable that key_variable names.",
                    ) from None
                except OpenAIError as error:
                    outcome = Failure(_reason(error), _shown(error, endpoint))
                if isinstance(outcome, Answer):
                    answers.write(key, outcome)
                    in_a_row = 0
                else:
                    tally.failures[key] = outcome
                    in_a_row += 1
                    if in_a_row >= endpoint.failures_in_a_row:
                        raise InputError(
                            f"the endpoint {endpoint.url} failed {in_a_row} times in a row, the last time with: "
                            f"{outcome.message}",
                            field=endpoint.section,
                            remedy="Start the stage again when the endpoint is back; the answers so far are kept.",
                        )
                progressed()

        async with AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.key, timeout=endpoint.attempt_seconds,
            max_retries=endpoint.retries, http_client=DefaultAsyncHttpxClient(event_hooks={"request": [tally.sent]}),
        ) as client:  # fmt: skip
            await asyncio.gather(*(worker() for _ in range(endpoint.concurrency)))

    with AnswerWriter(cache) as answers:
        asyncio.run(run())
    return AskingReport(tally.failures, tally.calls, tally.retries, tally.prompt_tokens, tally.completion_tokens)


class _Tally:
    """An AskingReport in the making."""

    def __init__(self) -> None:
        self.failures: dict[str, Failure] = {}
        self.calls = self.retries = self.prompt_tokens = self.completion_tokens = 0

    async def sent(self, request: Any) -> None:
        """Called by the HTTP client for every request; its own retries are told by a header."""
        self.calls += 1
        self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"

    def tokens_of(self, completion: Any) -> tuple[int, int]:
        """Prompt and completion tokens that the endpoint reports, which are also summed here; 0 where it does not."""
        usage = getattr(completion, "usage", None)
        reported = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt, answer = (number if isinstance(number, int) and number > 0 else 0 for number in reported)
        self.prompt_tokens += prompt
        self.completion_tokens += answer
        return prompt, answer


async def _ask(client: AsyncOpenAI, endpoint: Endpoint, prompt: str, tally: _Tally) -> Answer | Failure:
    """One question with all its attempts; raises OpenAIError."""
    optional = {} if endpoint.temperature is None else {"temperature": endpoint.temperature}
    try:
        completion: Any = await client.chat.completions.create(
            model=endpoint.model,
            messages=[{"role": "system", "content": endpoint.instruction}, {"role": "user", "content": prompt}],
            max_tokens=endpoint.maximum_tokens,
            **optional,  # type: ignore[call-overload]
        )
    except ValueError as error:  # the client lets the JSON parser's error through
        return Failure("not a completion", f"the answer is not JSON ({error})")
    tokens = tally.tokens_of(completion)
    # The client does not check what it has parsed, and compatible servers differ.
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    content = getattr(getattr(choice, "message", None), "content", None)
    if not isinstance(content, str):
        return Failure("not a completion", "the answer holds no message")
    complete = getattr(choice, "finish_reason", None) != "length"
    text = usable_text(content, complete=complete, maximum_tokens=endpoint.maximum_tokens)
    return text if isinstance(text, Failure) else Answer(text, *tokens)


def _reason(error: OpenAIError) -> str:
    """What the error is counted as."""
    match error:
        case RateLimitError():
            return "rate limit"
        case APIStatusError():
            return "server error" if error.status_code >= 500 else "refused request"
        case APITimeoutError():
            return "attempt timeout"
        case APIConnectionError():
            return "no connection"
    return "not a completion"


def _shown(error: Exception, endpoint: Endpoint) -> str:
    """The error in a line or two, with the body of a refusal; servers like to quote the key."""
    said = f"status {error.status_code}, {error.response.text}" if isinstance(error, APIStatusError) else str(error)
    message = " ".join(f"{type(error).__name__}: {said}".replace(endpoint.key, "(key)").split())
    return message if len(message) <= 300 else f"{message[:300]} ..."
