"""The reward actor: reads the answers of a batch of rollouts and scores them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from curriculum.corpus import load_sequences
from curriculum.tokenizer import saved_tokenizer
from item_index.constraint import MODES, AnswerConstraint
from item_index.neighbours import ItemKNearestNeighbours
from item_index.semantic_ids import SemanticIdIndex
from learner.rollouts import RolloutBatch, allowed_in
from rewards.answer import parse_answer
from rewards.chains import CHAIN, chain_figures, semantic_ids_in
from rewards.collaborative import CollaborativeReward
from rewards.composition import RESIDUAL_SENSITIVE, RewardSample, load_reward_term, not_fitted

CONTEXT_CHARACTERS = 200


class RewardTimeout(BaseException):
    """A user's reward took too long; no `Exception`, so that the reward itself does not catch it."""


@dataclass(frozen=True)
class RewardFailure:
    """Why a group has no rewards.

    Attributes:
        group: its number in the scores.
        response: number of the response in the group; -1 where the worker was lost.
        term: name of the reward.
        problem: what happened.
        context: mode, true item and text of the response, as far as known.
    """

    group: int
    response: int
    term: str
    problem: str
    context: str

    def __str__(self) -> str:
        where = f"response {self.response} of group {self.group}" if self.response >= 0 else f"group {self.group}"
        return f"{self.term}, {where}: {self.problem}; {self.context}"


@dataclass(frozen=True)
class ScoredResponses:
    """What the rewards say of the responses of a batch; arrays [R], group after group, but for [G] ones.

    Attributes:
        group_sizes: int64 [G], responses of each group.
        scored: bool [G]; False where a response of the group has no reward. The rewards of such a group are NaN.
        rewards: float32, weighted sum of all terms.
        components: float32 [R, terms], each term before its weight, NaN where it does not count in the mode.
        hits: bool, the answer is the true item, format included.
        valid: bool, the answer is an item of the catalogue.
        well_formed: bool, the response has the required format.
        forced: bool, the closing was forced by the token budget.
        items: int32, row of the answered item, -1 for none.
        lengths: int32, response tokens.
        chains: `rewards.chains.CHAIN`, what the chains are made of, against the history that the prompt shows; zeros in
            direct mode.
        failures: why groups are not scored, the first failure of each.
    """

    group_sizes: np.ndarray
    scored: np.ndarray
    rewards: np.ndarray
    components: np.ndarray
    hits: np.ndarray
    valid: np.ndarray
    well_formed: np.ndarray
    forced: np.ndarray
    items: np.ndarray
    lengths: np.ndarray
    chains: np.ndarray
    failures: tuple[RewardFailure, ...] = ()

    @staticmethod
    def unscored(size: int, terms: int, failure: RewardFailure) -> ScoredResponses:
        """A group of `size` responses of which nothing is known."""
        no, nan = np.zeros(size, bool), np.float32(np.nan)
        return ScoredResponses(
            np.array([size]), np.array([False]), np.full(size, nan), np.full((size, terms), nan), no, no, no, no,
            np.full(size, -1, np.int32), np.zeros(size, np.int32), np.zeros(size, CHAIN), (replace(failure, group=0),),
        )  # fmt: skip

    @staticmethod
    def concatenate(parts: Sequence[ScoredResponses]) -> ScoredResponses:
        """All groups of all parts."""
        first = np.cumsum([0, *(len(part.group_sizes) for part in parts)])
        failures = [
            replace(failure, group=failure.group + int(start))
            for part, start in zip(parts, first, strict=False)
            for failure in part.failures
        ]
        arrays = [field.name for field in fields(ScoredResponses) if field.name != "failures"]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
        return ScoredResponses(**columns, failures=tuple(failures))

    def select(self, groups: np.ndarray) -> ScoredResponses:
        """Some groups, in the given order."""
        ends = np.cumsum(self.group_sizes)
        rows = np.concatenate([np.arange(ends[group] - self.group_sizes[group], ends[group]) for group in groups])
        columns = {
            field.name: getattr(self, field.name)[groups if field.name in ("group_sizes", "scored") else rows]
            for field in fields(self)
            if field.name != "failures"
        }
        place = {int(group): number for number, group in enumerate(groups)}
        failures = [replace(one, group=place[one.group]) for one in self.failures if one.group in place]
        return ScoredResponses(**columns, failures=tuple(sorted(failures, key=lambda failure: failure.group)))


class RewardWorker:
    """Scores rollouts against one index; holds a tokenizer to read the chains.

    Args:
        terms: arguments of `load_reward_term`, summed up by their weights.
        seconds_per_response: time-out of each of the user's rewards; needs the main thread of the process.
        constrained: whether the rollouts were sampled under the constraint.
        collaborative: what the reward of that name needs: the corpus `folder`, whose train interactions it is fitted
            to, `usual_users`, as many of whom tell an item's usual gain, and arguments of `ItemKNearestNeighbours`.
    """

    def __init__(
        self, index_folder: str, tokenizer_folder: str, *, minimum_think_tokens: int = 8,
        terms: Sequence[dict[str, Any]] = ({"reward": RESIDUAL_SENSITIVE},), seconds_per_response: float = 10.0,
        constrained: bool = True, collaborative: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.index = SemanticIdIndex.load(index_folder)
        self.tokenizer: Any = saved_tokenizer(tokenizer_folder)
        self.constraint = AnswerConstraint.of(self.index, self.tokenizer, constrained=constrained)
        self.minimum_think_tokens = minimum_think_tokens
        fitted = not_fitted if collaborative is None else self._collaborative(**collaborative)
        self.terms = [load_reward_term(**term, collaborative=fitted) for term in terms]
        self.seconds_per_response = seconds_per_response
        if not all(term.built_in for term in self.terms):
            if threading.current_thread() is not threading.main_thread():
                raise ValueError("rewards with a time-out can be computed in the main thread of a process alone")
            signal.signal(signal.SIGALRM, _interrupt)
        self.item_of_codes = self.index.row_of_codes
        self.item_codes = list(self.item_of_codes)  # in the order of the rows

    def _collaborative(self, folder: str, usual_users: int, **arguments: Any) -> CollaborativeReward:
        sequences = load_sequences(Path(folder))
        train = [sequences.train(user) for user in range(len(sequences))]
        neighbours = ItemKNearestNeighbours(**arguments).fit(train, len(self.index.item_ids))
        among = np.linspace(0, len(train) - 1, min(usual_users, len(train))).astype(np.int64)  # evenly, all if few
        return CollaborativeReward(neighbours, self.index.item_ids, [train[user] for user in among])

    def started(self) -> bool:
        """Answered once the rewards are loaded."""
        return True

    def select(self, batch: RolloutBatch, groups: np.ndarray) -> RolloutBatch:
        """Some groups of a batch, for a driver that does not want all of it."""
        return batch.select(groups)

    def score_parts(self, groups: Sequence[np.ndarray], *batches: RolloutBatch) -> list[ScoredResponses]:
        """`score` of some groups of each batch, in one call."""
        return [self.score(batch, some) for batch, some in zip(batches, groups, strict=True)]

    def score(self, batch: RolloutBatch, groups: np.ndarray | None = None) -> ScoredResponses:
        """Rewards of every response of some groups, of all without a choice.

        A user's reward that raises, takes too long or gives no finite number costs the group its rewards, and is among
        the failures. Raises ConstraintViolation when a response left the constraint, and ValueError for rollouts under
        another index.
        """
        if batch.index_version != self.index.version:
            raise ValueError(f"rollouts of index {batch.index_version} cannot be scored with {self.index.version}")
        if groups is not None:
            batch = batch.select(groups)
        forced_R = allowed_in(batch, self.constraint).forced_R
        items = np.full(len(forced_R), -1, np.int32)
        components = np.full((len(forced_R), len(self.terms)), np.nan, np.float32)
        well_formed, chains = np.zeros(len(forced_R), bool), np.zeros(len(forced_R), CHAIN)
        special, decode = self.constraint.tokens, self.tokenizer.decode
        group_R, prompts, starts = batch.group_of_response, batch.prompts, batch.group_starts
        shown = [semantic_ids_in(prompt.tolist(), special) for prompt in prompts.tokens]
        histories = [
            tuple(self.index.item_ids[self.item_of_codes[codes]] for codes in ids if codes in self.item_of_codes)
            for ids in shown
        ]
        failures: dict[int, RewardFailure] = {}
        for row, response in enumerate(batch.responses):
            group, tokens = int(group_R[row]), response.tolist()
            mode = MODES[int(prompts.reasoning[group])]
            if mode == "reasoning":
                history = set(shown[group])
                chains[row] = chain_figures(tokens, history=history, special=special, decode=decode)
            answer = parse_answer(
                tokens, mode=mode, special=special, decode=decode, minimum_think_tokens=self.minimum_think_tokens,
                forced=bool(forced_R[row]),
            )  # fmt: skip
            if answer.codes is not None:
                items[row] = self.item_of_codes.get(answer.codes, -1)
                well_formed[row] = answer.well_formed
            if group in failures:
                continue
            truth = int(prompts.targets[group])
            sample = RewardSample(
                mode, tuple(tokens), histories[group], self.index.item_ids[truth],
                None if items[row] < 0 else self.index.item_ids[items[row]], self.item_codes[truth], answer.codes,
                self.index.levels, answer.well_formed, bool(forced_R[row]), decode,
            )  # fmt: skip
            for number, term in enumerate(self.terms):
                if mode not in term.modes:
                    continue
                try:
                    if term.built_in:
                        components[row, number] = term.value(sample)
                    else:
                        with _time_limit(self.seconds_per_response):
                            components[row, number] = term.value(sample)
                except (Exception, RewardTimeout) as error:
                    place = row - int(starts[group])
                    failures[group] = RewardFailure(group, place, term.name, _problem(error), _context(sample))
                    break
        rewards = np.nan_to_num(components) @ np.array([term.weight for term in self.terms], np.float32)
        scored = ~np.isin(np.arange(len(batch)), list(failures))
        rewards[~scored[group_R]] = np.nan
        return ScoredResponses(
            group_sizes=batch.group_sizes,
            scored=scored,
            rewards=rewards,
            components=components,
            hits=well_formed & (items == prompts.targets[group_R]),
            valid=items >= 0,
            well_formed=well_formed,
            forced=forced_R,
            items=items,
            lengths=batch.responses.lengths.astype(np.int32),
            chains=chains,
            failures=tuple(failures.values()),
        )


def _interrupt(signal_number: int, frame: Any) -> None:
    raise RewardTimeout


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises RewardTimeout inside the block; interrupts Python code and waiting, not native code that computes."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _problem(error: BaseException) -> str:
    if isinstance(error, RewardTimeout):
        return "it took longer than train.reward_seconds"
    return str(error) if isinstance(error, ValueError) else f"it raised {type(error).__name__}: {error}"


def _context(sample: RewardSample) -> str:
    text = sample.text if len(sample.text) <= CONTEXT_CHARACTERS else f"{sample.text[:CONTEXT_CHARACTERS]}…"
    return f"{sample.mode} mode, true item {sample.true_item!r}, response {text!r}"


RewardActor: Any = ray.remote(RewardWorker)
