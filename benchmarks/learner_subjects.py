"""One program that computes the policy loss of groups of responses and its gradient, in a process of its own.

    python -m benchmarks.learner_subjects '{"subject": "ours", "model": "FOLDER", ...}'

`benchmarks.learner` starts it and reads the JSON of the last line. A group is a prompt and its responses. In direct
mode a response is a semantic ID of four codes and the end of sequence. In reasoning mode it is free text, from which
the codes are forbidden, then such an answer. Allowed sets are as large as in a catalogue of a million items: 256 codes
at the first level, then 256, 16 and 1.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from item_index.constraint import AllowedTokens
from item_index.ragged import RaggedArray

WARM_UP = 2
CODES, CHILDREN = 256, (256, 256, 16, 1)
END = 1
FIRST_CODE = 16  # tokens before it: specials; then 4 levels of codes; then words
WORDS = FIRST_CODE + 4 * CODES


@dataclass(frozen=True)
class Task:
    """What one child process does: `backwards` gradients of `groups` groups each, after the warm-up."""

    subject: str
    model: str
    vocabulary: int
    mode: str
    groups: int
    backwards: int
    seed: int = 0

    @property
    def prompt_tokens(self) -> int:
        return {"direct": 200, "reasoning": 300}[self.mode]

    @property
    def responses(self) -> int:
        return {"direct": 16, "reasoning": 10}[self.mode]

    @property
    def longest_response(self) -> int:
        return {"direct": 5, "reasoning": 200}[self.mode]


@dataclass(frozen=True)
class Groups:
    """The groups of one backward pass: prompts, responses (group after group), allowed sets of all response tokens,
    advantages of the responses, float32."""

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    allowed: AllowedTokens
    advantages: np.ndarray

    def of(self, group: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """A group as (prompt, responses)."""
        n = len(self.responses) // len(self.prompts)
        return self.prompts[group], self.responses[group * n : (group + 1) * n]


def random_groups(task: Task, number: int) -> Groups:
    """The groups of backward pass `number`, the same for every subject."""
    generator = np.random.default_rng([task.seed, number])
    prompts = [generator.integers(WORDS, task.vocabulary, task.prompt_tokens) for _ in range(task.groups)]
    responses: list[np.ndarray] = []
    kinds: list[int] = []
    listed: list[Sequence[int] | np.ndarray] = []
    for _ in range(task.groups * task.responses):
        text = int(generator.integers(60, 201)) - 5 if task.mode == "reasoning" else 0
        words = generator.integers(WORDS, task.vocabulary, text)
        answer = []
        for level, children in enumerate(CHILDREN):
            codes = np.sort(generator.choice(CODES, children, replace=False)) + FIRST_CODE + level * CODES
            listed.append(codes)
            answer.append(int(generator.choice(codes)))
        listed[-4:-4] = [[]] * text
        listed.append([END])
        responses.append(np.array([*words, *answer, END]))
        kinds += [0] * text + [-1] * 5
    return Groups(
        prompts, responses, AllowedTokens(np.array(kinds, dtype=np.int8), RaggedArray.of(listed, np.int64)),
        generator.normal(size=len(responses)).astype(np.float32),
    )  # fmt: skip


def free_text_masks(task: Task) -> torch.Tensor:
    """bool [1, V]: words alone."""
    return (torch.arange(task.vocabulary) >= WORDS)[None]


def our_loss(current_T: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The clipped policy loss, on policy, averaged over the tokens of all responses."""
    from learner.objective import ObjectiveSettings, token_losses

    old_T = current_T.detach()
    lengths = torch.tensor([len(response) for response in groups.responses])
    advantages_T = torch.repeat_interleave(torch.from_numpy(groups.advantages), lengths)
    losses, _ = token_losses(current_T, old_T, old_T, old_T, advantages_T, ObjectiveSettings(kl_coefficient=0.0))
    return losses.mean()


def ours(task: Task) -> Callable[[Groups], torch.Tensor]:
    """Groups packed with their prompt once."""
    from learner.packed_attention import PACKED
    from learner.packing import pack_groups
    from learner.policy import Policy, load_language_model

    policy, masks = Policy(load_language_model(task.model, attention=PACKED)).train(), free_text_masks(task)
    parameters[:] = policy.parameters()

    def loss(groups: Groups) -> torch.Tensor:
        packed = pack_groups([groups.of(group) for group in range(len(groups.prompts))])
        return our_loss(policy(packed, groups.allowed, masks), groups)

    return loss


def ours_padded(task: Task) -> Callable[[Groups], torch.Tensor]:
    """The same head and objective on a padded batch of [prompt | response] in transformers' own attention."""
    from learner.log_probabilities import allowed_log_probabilities
    from learner.policy import load_language_model

    model, masks = load_language_model(task.model).train(), free_text_masks(task)
    parameters[:] = model.parameters()

    def loss(groups: Groups) -> torch.Tensor:
        ids, attention = padded_batch(groups)
        hidden = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        prompt = len(groups.prompts[0])
        hidden_TH = hidden[:, prompt - 1 : -1][attention[:, prompt:].bool()]
        targets_T = torch.from_numpy(np.concatenate(groups.responses))
        head = model.get_output_embeddings().weight
        return our_loss(allowed_log_probabilities(hidden_TH, head, targets_T, groups.allowed, masks), groups)

    return loss


def trl_trainer(task: Task, *, head_at_responses: bool, loss_type: str = "bnpo", beta: float = 0.0) -> Any:
    """`trl.GRPOTrainer` in training mode; without Triton it sends the prompts through the output head as well, unless
    `head_at_responses` turns on the selection that it makes with Triton."""
    import datasets
    import trl.trainer.utils
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    if head_at_responses:
        trl.trainer.utils._use_triton = lambda device: True
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, attn_implementation="sdpa"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            loss_type=loss_type, beta=beta, use_bias_correction_kl=False, num_generations=task.responses,
            per_device_train_batch_size=task.responses, max_completion_length=task.longest_response, epsilon=0.2,
            epsilon_high=0.2, delta=10.0,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w5"] * 64}),
        processing_class=AutoTokenizer.from_pretrained(task.model),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def trl_inputs(groups: Groups) -> dict[str, torch.Tensor]:
    """What its loss wants to know of the groups."""
    ids, attention = padded_batch(groups)
    prompt = len(groups.prompts[0])
    return {
        "prompt_ids": ids[:, :prompt], "prompt_mask": attention[:, :prompt], "completion_ids": ids[:, prompt:],
        "completion_mask": attention[:, prompt:], "advantages": torch.from_numpy(groups.advantages),
    }  # fmt: skip


def trl(task: Task, *, head_at_responses: bool) -> Callable[[Groups], torch.Tensor]:
    """`trl.GRPOTrainer`'s own loss."""
    trainer = trl_trainer(task, head_at_responses=head_at_responses)
    parameters[:] = trainer.model.parameters()
    return lambda groups: trainer._compute_loss(trainer.model, trl_inputs(groups))


def padded_batch(groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [responses, prompt + longest]."""
    n = len(groups.responses) // len(groups.prompts)
    longest = max(len(response) for response in groups.responses)
    prompt = len(groups.prompts[0])
    ids = np.zeros((len(groups.responses), prompt + longest), dtype=np.int64)
    attention = np.zeros_like(ids)
    for row, response in enumerate(groups.responses):
        whole = np.concatenate([groups.prompts[row // n], response])
        ids[row, : len(whole)], attention[row, : len(whole)] = whole, 1
    return torch.from_numpy(ids), torch.from_numpy(attention)


parameters: list[torch.nn.Parameter] = []
SUBJECTS: dict[str, Callable[[Task], Callable[[Groups], torch.Tensor]]] = {
    "ours": ours,
    "ours, padded": ours_padded,
    "TRL, head at responses": partial(trl, head_at_responses=True),
    "TRL": partial(trl, head_at_responses=False),
}


def measure(task: Task) -> dict[str, float]:
    """Groups per second of loss and gradient, and the peak memory of the process beside what the model takes."""
    loss_of = SUBJECTS[task.subject](task)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: list[float] = []
    value: Any = None
    for number in range(WARM_UP + task.backwards):
        groups = random_groups(task, number)
        for parameter in parameters:
            parameter.grad = None
        started = time.perf_counter()
        value = loss_of(groups)
        value.backward()
        seconds.append(time.perf_counter() - started)
    norm = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None]).norm()
    timed = seconds[WARM_UP:]
    return {
        "groups per second": task.groups * len(timed) / sum(timed), "slowest": task.groups / max(timed),
        "fastest": task.groups / min(timed),
        "peak memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "loss": value.item(),
        "gradient norm": float(norm),
    }  # fmt: skip


def command(task: Task) -> list[str]:
    """The command line that measures the task in a process of its own."""
    return [sys.executable, "-m", "benchmarks.learner_subjects", json.dumps(asdict(task))]


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))))
