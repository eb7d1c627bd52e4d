"""The learner's loss and gradient beside those of `trl.GRPOTrainer`: is the objective the field's?

    python -m benchmarks.learner_agreement [--mode reasoning] [--vocabulary 3000] [--json FILE]

Plain GRPO and its relatives on the same groups, weights and constants, without a constraint, in float32: advantages
that are relative to the group, old log-probabilities that differ from the current ones so that clips act, and a penalty
to a reference (k3, without the importance factor that newer versions of TRL put before it by default). TRL's loss types
are `grpo`, `bnpo` and `dr_grpo`; ours are the token means `per_response`, `global` and `constant`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from benchmarks.learner import SHAPES
from benchmarks.learner_subjects import Groups, Task, random_groups, trl_inputs, trl_trainer
from benchmarks.machine import ReportRow, write_report
from benchmarks.random_model import write_random_model
from cluster.progress import console
from learner.advantages import group_relative_advantages
from learner.objective import ObjectiveSettings, TokenMean, token_losses, token_weights
from learner.packed_attention import PACKED
from learner.packing import pack_groups
from learner.policy import Policy, load_language_model

LOSS_TYPES: dict[str, TokenMean] = {"grpo": "per_response", "bnpo": "global", "dr_grpo": "constant"}  # TRL's: ours
DRIFT = 0.15  # standard deviation of old and reference log-probabilities around the current ones
KL_COEFFICIENT = 0.04


def our_gradient(
    task: Task, groups: Groups, drift: torch.Tensor, token_mean: TokenMean
) -> tuple[float, float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, share of clipped tokens, gradients by name, and log-probabilities [T] of the packed groups;
    `drift` is [2, T], what the old and the reference log-probabilities are above the current ones."""
    policy = Policy(load_language_model(task.model, attention=PACKED)).train()
    lengths = torch.tensor([len(response) for response in groups.responses])
    current = policy(pack_groups([groups.of(group) for group in range(len(groups.prompts))]))
    old, reference = current.detach() + drift
    settings = ObjectiveSettings(kl_coefficient=KL_COEFFICIENT, token_mean=token_mean)
    advantages_T = torch.repeat_interleave(torch.from_numpy(groups.advantages), lengths)
    losses, diagnostics = token_losses(current, old, old, reference, advantages_T, settings)
    weights = token_weights(
        torch.ones(len(losses), dtype=torch.int64), torch.ones(len(losses), dtype=torch.bool), (0, 1), token_mean,
        response_T=torch.repeat_interleave(lengths), longest=task.longest_response,
    )  # fmt: skip
    loss = (weights * losses).sum()
    loss.backward()
    gradients = {name: weight.grad for name, weight in policy.language_model.named_parameters()}
    return loss.item(), float(diagnostics["clipped"].mean()), gradients, current.detach()


def their_gradient(
    task: Task, groups: Groups, drifted: torch.Tensor, loss_type: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by name; `drifted` is [2, T], the old and the reference log-probabilities."""
    trainer: Any = trl_trainer(task, head_at_responses=True, loss_type=loss_type, beta=KL_COEFFICIENT)
    inputs = trl_inputs(groups)
    for name, values in zip(("old_per_token_logps", "ref_per_token_logps"), drifted, strict=True):
        padded = torch.zeros(inputs["completion_mask"].shape)
        padded[inputs["completion_mask"].bool()] = values
        inputs[name] = padded
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in trainer.model.named_parameters()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def benchmark(
    model: Annotated[str, typer.Option(help=f"Shape: {', '.join(SHAPES)}.")] = "8M",
    mode: Annotated[str, typer.Option(help="direct, reasoning")] = "direct",
    vocabulary: Annotated[int, typer.Option(min=1100)] = 3000,
    groups: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the numbers and the machine.")] = None,
) -> None:
    """Compare loss and gradient of one step with TRL's."""
    report: list[ReportRow] = []
    case = f"{model}, {mode}, vocabulary {vocabulary}, {groups} groups"
    table = Table(title=case)
    for column in ("TRL", "our token mean", "our loss", "its loss", "relative", "gradient, relative", "clipped"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(Path(folder), vocabulary, **SHAPES[model])
        task = Task("ours", folder, vocabulary, mode, groups, 1)
        drawn = random_groups(task, 0)
        rewards = torch.from_numpy(np.random.default_rng(1).choice([0.0, 0.5, 1.0], len(drawn.responses)))
        sizes = torch.full((groups,), task.responses)
        advantages = group_relative_advantages(rewards, sizes).float().numpy()
        drawn = Groups(drawn.prompts, drawn.responses, drawn.allowed, advantages)
        tokens = sum(map(len, drawn.responses))
        drift = DRIFT * torch.randn(2, tokens, generator=torch.Generator().manual_seed(0))
        for loss_type, token_mean in LOSS_TYPES.items():
            ours, clipped, our_gradients, current = our_gradient(task, drawn, drift, token_mean)
            theirs, their_gradients = their_gradient(task, drawn, current + drift, loss_type)
            differences = [our_gradients[name] - their_gradients[name] for name in their_gradients]
            gradient = norm(differences) / norm(list(their_gradients.values()))
            relative = abs(ours - theirs) / abs(theirs)
            table.add_row(
                loss_type, token_mean, f"{ours:.7f}", f"{theirs:.7f}", f"{relative:.1e}", f"{gradient:.1e}",
                f"{clipped:.0%}",
            )  # fmt: skip
            for metric, value in (("loss, relative difference", relative), ("gradient, relative difference", gradient)):
                report.append({"case": case, "subject": loss_type, "metric": metric, "value": value, "unit": ""})
    console.print(table)
    if json_file is not None:
        write_report(json_file, report)


def norm(gradients: list[torch.Tensor]) -> float:
    """Of all of them together."""
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


if __name__ == "__main__":
    app()
