"""Settings of the model, of supervised training and of SRPO."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from cluster.alarms import AlarmSection
from cluster.section import Section
from item_index.constraint import MODES, Mode
from rewards.composition import RESIDUAL_SENSITIVE


class ModelSettings(Section):
    checkpoint: str | None = Field(
        None, description="Local Hugging Face checkpoint to start from; null builds a Llama."
    )
    hidden_size: int = Field(128, ge=32, description="Width of the Llama that is built from scratch, a multiple of 32.")
    intermediate_size: int = Field(256, ge=1, description="Width of its feed-forward blocks.")
    layers: int = Field(2, ge=1, description="Number of its layers.")


class LowRankSection(Section):
    rank: int = Field(16, ge=1, description="Rank of the added weights.")
    alpha: int = Field(32, ge=1, description="Their scale is alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the added weights.")
    modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1, description="Names of the modules that get them.",
    )  # fmt: skip


class TaskSettings(Section):
    weight: float = Field(
        1.0, ge=0, allow_inf_nan=False,
        description="Rows of a pass per example; 0 leaves the task out, below 1 draws a sample, above 1 repeats.",
    )  # fmt: skip
    cap: int | None = Field(None, ge=0, description="Rows of a pass at most; null is no limit.")


class AlignmentSettings(Section):
    next_item: TaskSettings = Field(
        default_factory=TaskSettings, description="History to next item, every train target."
    )
    next_title: TaskSettings = Field(default_factory=TaskSettings, description="History to the next item's title.")
    next_description: TaskSettings = Field(
        default_factory=TaskSettings, description="History to the next item's description."
    )
    titles_to_item: TaskSettings = Field(
        default_factory=TaskSettings, description="Titles of the history to the next item."
    )
    item_to_index: TaskSettings = Field(
        default_factory=TaskSettings, description="Title, description or both to their semantic ID."
    )
    index_to_item: TaskSettings = Field(
        default_factory=TaskSettings, description="Semantic ID to its title, description or both."
    )
    item_search: TaskSettings = Field(
        default_factory=TaskSettings, description="Preference, query or both, with or without history, to the item."
    )
    preference_obtain: TaskSettings = Field(
        default_factory=TaskSettings, description="History to the user's preference in words."
    )
    maximum_text_tokens: int = Field(
        512, ge=16, description="Tokens of one title, description, preference or query; the rest is cut."
    )
    next_item_templates: bool = Field(
        False, description="Word next_item in several ways instead of the prompt of direct mode alone."
    )


class SupervisedSettings(Section):
    passes: int = Field(3, ge=1, description="Passes over the rows; windows and templates are drawn anew for each.")
    supervision: Literal["every_prefix", "dense"] = Field(
        "every_prefix", description="A row for every train prefix, or windows whose history items are learnt as well."
    )
    curriculum: Literal["growing", "uniform"] = Field(
        "growing", description="Reasoning rows grow denser over every pass but the last; or, for ablation, never."
    )
    batch_rows: int = Field(64, ge=1, description="Rows of one optimizer step, of all ranks together.")
    micro_batch_tokens: int = Field(8192, ge=1, description="Packed tokens of one forward pass of a rank at most.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    warm_up: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps with a growing learning rate; cosine after."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    gradient_clip: float = Field(1.0, gt=0, description="Clip of the global gradient norm.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of embeddings and of what every block adds; for models made from scratch."
    )
    ranks: int = Field(1, ge=1, description="DeepSpeed ranks, each with cluster.learner_cpus and gpus_per_engine.")
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed's ZeRO stage.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of weights and activations; with bfloat16 the optimizer keeps float32 masters."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )
    low_rank: LowRankSection | None = Field(
        None, description="Train low-rank weights (LoRA) and the new tokens' rows; null trains all weights."
    )
    evaluation_rows: int = Field(
        512, ge=0, description="Validation users whose next item's loss is measured, drawn by the seed; 0 is none."
    )
    evaluation_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between two measurements; null is the end of each pass."
    )
    patience: int | None = Field(
        None, ge=1, description="Measurements without a better loss that end the stage, with the best weights."
    )
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between two resumable states; null is the end of each pass."
    )
    kept_states: int = Field(2, ge=1, description="Resumable states that are kept.")
    maximum_failures: int = Field(3, ge=0, description="Restarts of the ranks from the latest state before giving up.")
    alignment: AlignmentSettings = Field(
        default_factory=AlignmentSettings, description="The alignment tasks, how many rows each has, and their texts."
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> SupervisedSettings:
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError("sft.dtype bfloat16 needs sft.zero_stage 1, 2 or 3")
        if self.low_rank is not None and self.zero_stage == 3:
            raise ValueError("sft.low_rank works with sft.zero_stage 0, 1 and 2")
        if self.supervision == "dense" and self.alignment.next_item != TaskSettings():
            raise ValueError(
                "with sft.supervision dense, windows stand in for sft.alignment.next_item: leave it as it is"
            )
        if self.patience is not None and self.evaluation_rows == 0:
            raise ValueError("sft.patience needs sft.evaluation_rows above 0")
        return self


class ContinuedSettings(Section):
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate; null is that of sft.")
    steps: int | None = Field(
        None, ge=1,
        description="Optimizer steps; null is as many as take the time of the train stage, at the pace of sft.",
    )  # fmt: skip


class ObjectiveSection(Section):
    clip_low: float = Field(0.2, ge=0, lt=1, description="PPO clip below 1.")
    clip_high: float = Field(0.2, ge=0, description="PPO clip above 1.")
    dual_clip: float = Field(10.0, gt=1, description="Bound of the ratio's effect for negative advantages.")
    kl_coefficient: float = Field(0.001, ge=0, description="Weight of the k3 divergence from the frozen reference.")
    importance_cap: float = Field(2.0, gt=0, description="Truncation of the learner's over the sampler's probability.")
    token_mean: Literal["per_mode", "per_part", "global", "per_response", "constant"] = Field(
        "per_mode",
        description="Token mean inside each mode, weighted by prompts; per_part also halves reasoning between chains "
        "and answers; over all tokens; GRPO's; or Dr.GRPO's.",
    )
    valid_mass_coefficient: float = Field(
        0.0, ge=0,
        description="Weight of the log valid mass inside semantic IDs, an auxiliary gain; above 0 it is measured.",
    )  # fmt: skip
    true_answer_coefficient: float = Field(
        0.0, ge=0,
        description="Weight of the true items' mean log-probability behind the policy's own chains, an auxiliary gain "
        "of reasoning mode.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _clips_fit(self) -> ObjectiveSection:
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high}")
        return self


class RewardSection(Section):
    reward: str = Field(
        RESIDUAL_SENSITIVE, min_length=1,
        description="residual_sensitive, exact_match (0 or 1), collaborative (place in item-kNN's list), or the import "
        "path package.module:name of your own.",
    )  # fmt: skip
    weight: float = Field(1.0, allow_inf_nan=False, description="Its weight in the sum.")
    name: str | None = Field(None, description="Its name in metrics and messages; null takes that of the path.")
    modes: tuple[Mode, ...] = Field(MODES, min_length=1, description="The modes whose responses it counts for.")


class CollaborativeSection(Section):
    neighbours: int = Field(1000, ge=1, description="Most similar items that an item of the history votes for.")
    decay: float = Field(0.6, gt=0, le=1, description="Weight of an item of the history against the one after it.")
    popularity_discount: float = Field(
        0.1, ge=0, description="Votes are divided by the item's number of train users to this power."
    )
    usual_users: int = Field(
        2000, ge=0,
        description="Train users whose gains give an item's usual gain, the divisor of its gain; 0 divides nothing.",
    )  # fmt: skip


class TrainSettings(Section):
    steps: int = Field(150, ge=0, description="Optimizer phases: rollouts, update, weight transfer.")
    prompts_per_step: int = Field(256, ge=1, description="Groups that one step trains on.")
    mini_batch_prompts: int = Field(64, ge=1, description="Groups of one optimizer step.")
    responses: int = Field(10, ge=2, description="Responses of a group (n).")
    advantages: Literal["bonus_calibrated", "group_relative", "centred", "pass_at_k"] = Field(
        "bonus_calibrated", description="GREAM's; or for ablation GRPO's, Dr.GRPO's, or the Pass@K bonus alone."
    )
    pass_k: int = Field(4, ge=1, description="K of the Pass@K bonus.")
    reasoning_share: float = Field(0.5, ge=0, le=1, description="Share of the prompts in reasoning mode.")
    exclude_seen: bool = Field(True, description="Answers may not be items of the user's own earlier history.")
    constrained_rollouts: bool = Field(
        True, description="Sample under the constraint; false leaves format and items to the model, for ablation."
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; no top-p, no top-k.")
    reasoning_budget: int = Field(1560, ge=1, description="Tokens of a reasoning response at most.")
    rewards: tuple[RewardSection, ...] = Field(
        (RewardSection(),), min_length=1, description="What is summed up to the reward of a response."
    )
    collaborative: CollaborativeSection = Field(
        default_factory=CollaborativeSection, description="Of the reward of that name; fitted to train interactions."
    )
    reward_seconds: float = Field(10, gt=0, description="Time-out of each of your own rewards for one response.")
    minimum_think_tokens: int = Field(8, ge=0, description="A shorter think block earns no format credit.")
    learning_rate: float = Field(2e-6, ge=0, description="Learning rate after the warm-up.")
    warm_up_steps: int = Field(10, ge=0, description="Optimizer steps with a growing learning rate.")
    learning_rate_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="After the warm-up: constant, or down to 0 at the end of the stage."
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW's weight decay.")
    gradient_clip: float = Field(1.0, gt=0, description="Clip of the global gradient norm.")
    micro_batch_tokens: int = Field(8192, ge=1, description="Packed tokens of one forward pass of a rank at most.")
    epochs: int = Field(1, ge=1, description="How often a step goes through its mini-batches.")
    ranks: int = Field(1, ge=1, description="DeepSpeed ranks, each with cluster.learner_cpus and gpus_per_engine.")
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed's ZeRO stage.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the learner's weights and activations; with bfloat16 it keeps float32 masters."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass instead of keeping them."
    )
    offload_optimizer: bool = Field(
        False, description="Keep the optimizer's state in the host's memory and step there (train.zero_stage 1 to 3)."
    )
    low_rank: LowRankSection | None = Field(
        None, description="Train low-rank weights (LoRA), their base being the reference; null trains all weights."
    )
    measure_valid_mass: bool = Field(
        False, description="Report how much of the unconstrained distribution lies on allowed tokens; costs the head."
    )
    maximum_skipped_steps: int = Field(
        3,
        ge=0,
        description="Skipped steps in a row (loss or gradient not finite) before the stage ends.",
    )
    generation_rounds: int = Field(4, ge=1, description="Rounds of generation that may fill one step's batch.")
    max_staleness: int = Field(
        0, ge=0,
        description="Versions that a trained group may be behind: 0 takes turns, above it engines work ahead.",
    )  # fmt: skip
    weight_check_steps: int = Field(
        10,
        ge=1,
        description="Engine and learner are compared after the first step and after every so many.",
    )
    weight_gap: float = Field(
        0.1, gt=0, description="Difference of their log-probabilities above which the stage ends with an error."
    )
    checkpoint_steps: int = Field(
        10, ge=1, description="Steps between two states from which an interrupted stage goes on."
    )
    kept_states: int = Field(2, ge=1, description="Latest states that are kept while the stage runs.")
    dump_rollouts: bool = Field(
        False, description="Write the groups that a step trains on into rollouts/, to show them or to train on again."
    )
    prompt_curriculum: bool = Field(
        False, description="Ask more rarely for prompts whose latest groups had no variance."
    )
    probe_prompts: int = Field(256, ge=0, description="Fixed validation prompts scored before and after training.")
    validation_steps: int | None = Field(
        None, ge=1, description="Steps between two scorings of these prompts; the best policy is kept as train/best."
    )
    result: Literal["last", "best"] = Field(
        "last", description="Which policy becomes train/checkpoint; best needs validation_steps."
    )
    alarms: AlarmSection = Field(default_factory=AlarmSection, description="When a run is warned of, or stopped.")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="The token-level objective.")

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainSettings:
        names = [term.name or term.reward for term in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"train.rewards has two terms of one name, {names}: give them names of their own")
        shares = {"direct": 1 - self.reasoning_share, "reasoning": self.reasoning_share}
        for mode, share in shares.items():
            if share > 0 and not any(mode in term.modes for term in self.rewards):
                raise ValueError(
                    f"train.rewards has no term that counts in {mode} mode; train.reasoning_share asks for it"
                )
        if not self.constrained_rollouts and (self.measure_valid_mass or self.objective.valid_mass_coefficient):
            raise ValueError("train.measure_valid_mass needs train.constrained_rollouts")
        if not self.constrained_rollouts and self.objective.true_answer_coefficient:
            raise ValueError("train.objective.true_answer_coefficient needs train.constrained_rollouts")
        if self.result == "best" and self.validation_steps is None:
            raise ValueError("train.result best needs train.validation_steps")
        if self.validation_steps is not None and self.probe_prompts == 0:
            raise ValueError("train.validation_steps needs train.probe_prompts above 0")
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError("train.dtype bfloat16 needs train.zero_stage 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("train.offload_optimizer needs train.zero_stage 1, 2 or 3")
        if self.low_rank is not None and self.zero_stage == 3:
            raise ValueError("train.low_rank works with train.zero_stage 0, 1 and 2")
        if self.low_rank is not None and self.low_rank.dropout:
            raise ValueError("train.low_rank.dropout must be 0: under dropout learner and sampler are two policies")
        return self

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole stage, where every step finds its groups."""
        return self.steps * self.epochs * math.ceil(self.prompts_per_step / self.mini_batch_prompts)
