"""Every setting of a run, with its meaning and unit. Defaults are the paper's; presets in `configs/` fit a machine."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from item_index.input_error import InputError


class Section(BaseModel):
    """Strict: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(Section):
    items: str = Field(
        "data/items.parquet", description="Parquet file of the items: item_id, title, and optional columns."
    )
    interactions: str = Field(
        "data/interactions.parquet", description="Parquet file of the interactions: user_id, item_id, timestamp."
    )
    minimum_interactions: int = Field(
        5, ge=3, description="Users and items with fewer distinct interactions are dropped."
    )


class EndpointSettings(Section):
    """An OpenAI-compatible endpoint; the section that uses it says what for."""

    url: str | None = Field(
        None, description="Base URL of an OpenAI-compatible endpoint, such as http://host:8000/v1; null asks none."
    )
    model: str | None = Field(None, description="Name of the model at the endpoint.")
    key_variable: str | None = Field(
        None, description="Environment variable that holds the endpoint's key; null where it wants none."
    )
    cache: str | None = Field(
        None, description="Folder that keeps every answer; null is one in the stage's folder: fusion or teacher."
    )
    concurrency: int = Field(16, ge=1, description="Requests that are under way at once.")
    attempt_seconds: float = Field(60, gt=0, description="Deadline of one attempt.")
    deadline_seconds: float = Field(300, gt=0, description="Deadline of one question, all attempts and waits together.")
    retries: int = Field(5, ge=0, description="Attempts after the first, for rate limits, server errors and timeouts.")
    maximum_tokens: int = Field(256, ge=1, description="Tokens of an answer at most.")
    temperature: float | None = Field(0.0, ge=0, description="Sampling temperature; null leaves it to the endpoint.")
    failures_in_a_row: int = Field(
        100, ge=1, description="Questions that may fail one after another before the stage ends."
    )

    @model_validator(mode="after")
    def _endpoint_is_whole(self) -> Self:
        if self.url is not None and not self.model:
            raise ValueError("url names an endpoint, so model has to name its model")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url has to begin with http:// or https://")
        if self.url is not None and "@" in self.url:
            raise ValueError("url must hold no credentials; put the key into the variable that key_variable names")
        return self


class TeacherSettings(EndpointSettings):
    kind: Literal["metadata", "endpoint", "engine"] = Field(
        "metadata", description="Who writes traces, preferences and queries: rules, an endpoint, or an engine here."
    )
    checkpoint: str | None = Field(
        None, description="Local Hugging Face checkpoint with a chat template, for kind engine."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Data type of kind engine.")
    context_tokens: int = Field(4096, ge=2, description="Tokens of prompt and answer together, for kind engine.")
    maximum_tokens: int = Field(1024, ge=1, description="Tokens of an answer at most.")
    distributed: bool = Field(False, description="Endpoint calls as a Ray Data job; the results are the same.")
    fallback: Literal["none", "metadata"] = Field(
        "none", description="What a target gets whose answer fails or is rejected: no row, or the rules' text."
    )

    @model_validator(mode="after")
    def _fields_fit_the_kind(self) -> Self:
        kind_of = {"url": "endpoint", "model": "endpoint", "key_variable": "endpoint", "checkpoint": "engine"}
        for name, kind in kind_of.items():
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"{name} is set, but kind {self.kind} does not use it")
            if getattr(self, name) is None and self.kind == kind and name != "key_variable":
                raise ValueError(f"kind {self.kind} needs {name}")
        if self.distributed and self.kind != "endpoint":
            raise ValueError(f"distributed is for endpoint calls; kind {self.kind} makes none")
        if self.fallback == "metadata" and self.kind == "metadata":
            raise ValueError("fallback metadata is for the kinds endpoint and engine; kind metadata calls no model")
        if self.kind == "engine" and self.temperature is None:
            raise ValueError("kind engine needs a temperature; 0 is greedy")
        if self.kind == "engine" and self.maximum_tokens >= self.context_tokens:
            raise ValueError("maximum_tokens leaves no room for a prompt in context_tokens")
        return self


class IndexSettings(Section):
    level_sizes: tuple[int, ...] = Field(
        (256, 256, 256, 256), min_length=1, description="Codes of each residual level."
    )
    fusion: EndpointSettings = Field(
        default_factory=EndpointSettings,
        description="Descriptions written by a language model out of text and reviews.",
    )
    embedding: Literal["tf_idf", "sentence_transformer", "language_model"] = Field(
        "tf_idf", description="What turns item text into vectors."
    )
    encoder_path: str | None = Field(
        None, description="Local folder of the sentence-transformers model or the causal language model."
    )
    encoder_tokens: int = Field(
        512, ge=1, description="Tokens of a title or description that a language model reads; the rest is cut."
    )
    encoder_batch_tokens: int = Field(
        16_384, ge=1, description="Padded tokens of one forward pass of a language model at most."
    )
    embedding_dimensions: int = Field(64, ge=1, description="Dimensions of the TF-IDF + SVD item vectors.")
    fit_items: int = Field(
        50_000, ge=1, description="Items that TF-IDF + SVD learns from at most, drawn by the seed; all are embedded."
    )
    collaborative_weight: float = Field(
        0.0, ge=0, description="Say of the train interactions in a vector, against the text's 1; 0 leaves them out."
    )
    collaborative_dimensions: int = Field(32, ge=1, description="Dimensions of the collaborative block.")
    distributed: bool = Field(
        False, description="Embedding and endpoint calls as Ray Data jobs; the results are the same."
    )
    balanced: bool = Field(False, description="Clusters of equal size instead of plain k-means.")
    rounds: int = Field(25, ge=1, description="Lloyd's rounds of a level at most.")
    training_items_per_code: int | None = Field(
        256, ge=1, description="Items per code that centroids are trained on at most, drawn by the seed; null is all."
    )
    device: str = Field("cpu", description="Torch device of the clustering, such as cpu or cuda.")
    spare_collision_codes: int = Field(8, ge=0, description="Collision codes reserved for items that come later.")

    @model_validator(mode="after")
    def _encoder_is_named(self) -> IndexSettings:
        if self.embedding != "tf_idf" and self.encoder_path is None:
            raise ValueError(f"embedding {self.embedding} needs encoder_path, a local folder")
        if self.embedding == "tf_idf" and self.encoder_path is not None:
            raise ValueError("encoder_path is set, but embedding tf_idf reads no model; name the kind in embedding")
        return self


class CorpusSettings(Section):
    history_items: int = Field(20, ge=1, description="Items of a history that a prompt shows, the latest ones.")
    minimum_history: int = Field(4, ge=1, description="Least items before a target for reasoning rows and RL prompts.")
    reasoning_rows: int | None = Field(
        None, ge=0, description="Reasoning rows at most, drawn by the seed; all when null."
    )
    rewritten_history_items: int = Field(6, ge=1, description="Items that a rewritten history keeps at most.")
    rl_holdout: float = Field(0.1, ge=0, lt=1, description="Share of train targets kept out of supervised rows for RL.")
    text_vocabulary: int = Field(600, ge=257, description="BPE tokens of a tokenizer that is trained from scratch.")
    teacher: TeacherSettings = Field(
        default_factory=TeacherSettings, description="Who writes reasoning traces, preferences and queries."
    )


class ModelSettings(Section):
    checkpoint: str | None = Field(
        None, description="Local Hugging Face checkpoint to start from; null builds a Llama."
    )
    hidden_size: int = Field(128, ge=32, description="Width of the Llama that is built from scratch, a multiple of 32.")
    intermediate_size: int = Field(256, ge=1, description="Width of its feed-forward blocks.")
    layers: int = Field(2, ge=1, description="Number of its layers.")


class LowRankSection(Section):
    rank: int = Field(16, ge=1, description="Rank of the added weights.")
    alpha: float = Field(32, gt=0, description="Their scale is alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the added weights.")
    modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1, description="Names of the modules that get them.",
    )  # fmt: skip


class SupervisedSettings(Section):
    passes: int = Field(3, ge=1, description="Passes over the rows; windows and templates are drawn anew for each.")
    supervision: Literal["every_prefix", "dense"] = Field(
        "every_prefix", description="A row for every train prefix, or windows whose history items are learnt as well."
    )
    batch_rows: int = Field(64, ge=1, description="Rows of one optimizer step, of all ranks together.")
    micro_batch_tokens: int = Field(8192, ge=1, description="Packed tokens of one forward pass of a rank at most.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    warm_up: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps with a growing learning rate; cosine after."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    gradient_clip: float = Field(1.0, gt=0, description="Clip of the global gradient norm.")
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

    @model_validator(mode="after")
    def _parts_fit(self) -> SupervisedSettings:
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError("sft.dtype bfloat16 needs sft.zero_stage 1, 2 or 3")
        if self.low_rank is not None and self.zero_stage == 3:
            raise ValueError("sft.low_rank works with sft.zero_stage 0, 1 and 2")
        if self.patience is not None and self.evaluation_rows == 0:
            raise ValueError("sft.patience needs sft.evaluation_rows above 0")
        return self


class ObjectiveSection(Section):
    clip_low: float = Field(0.2, ge=0, lt=1, description="PPO clip below 1.")
    clip_high: float = Field(0.2, ge=0, description="PPO clip above 1.")
    dual_clip: float = Field(10.0, gt=1, description="Bound of the ratio's effect for negative advantages.")
    kl_coefficient: float = Field(0.001, ge=0, description="Weight of the k3 divergence from the frozen reference.")
    importance_cap: float = Field(2.0, gt=0, description="Truncation of the learner's over the sampler's probability.")
    token_mean: Literal["per_mode", "global"] = Field(
        "per_mode", description="Token mean inside each mode, weighted by prompts, or over all tokens alike."
    )

    @model_validator(mode="after")
    def _clips_fit(self) -> ObjectiveSection:
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip must be above 1 + clip_high = {1 + self.clip_high}")
        return self


class TrainSettings(Section):
    steps: int = Field(150, ge=0, description="Optimizer phases: rollouts, update, weight transfer.")
    prompts_per_step: int = Field(256, ge=1, description="Groups that one step trains on.")
    mini_batch_prompts: int = Field(64, ge=1, description="Groups of one optimizer step.")
    responses: int = Field(10, ge=2, description="Responses of a group (n).")
    pass_k: int = Field(4, ge=1, description="K of the Pass@K bonus.")
    reasoning_share: float = Field(0.5, ge=0, le=1, description="Share of the prompts in reasoning mode.")
    exclude_seen: bool = Field(True, description="Answers may not be items of the user's own earlier history.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; no top-p, no top-k.")
    reasoning_budget: int = Field(1560, ge=1, description="Tokens of a reasoning response at most.")
    minimum_think_tokens: int = Field(8, ge=0, description="A shorter think block earns no format credit.")
    learning_rate: float = Field(2e-6, ge=0, description="Learning rate after the warm-up.")
    warm_up_steps: int = Field(10, ge=0, description="Optimizer steps with a growing learning rate.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's weight decay.")
    gradient_clip: float = Field(1.0, gt=0, description="Clip of the global gradient norm.")
    micro_batch_tokens: int = Field(8192, ge=1, description="Packed tokens of one forward pass at most.")
    zero_stage: int = Field(2, ge=0, le=3, description="DeepSpeed's ZeRO stage.")
    generation_rounds: int = Field(4, ge=1, description="Rounds of generation that may fill one step's batch.")
    maximum_staleness: int = Field(1, ge=0, description="Steps for which surplus groups may be kept.")
    probe_prompts: int = Field(256, ge=0, description="Fixed validation prompts scored before and after training.")
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="The token-level objective.")


class EvaluationSettings(Section):
    part: Literal["test", "validation"] = Field("test", description="Which target of each user is evaluated.")
    users: int | None = Field(None, ge=1, description="Users to evaluate, drawn by the seed; all when null.")
    beam_width: int = Field(50, ge=50, description="Beams of direct mode, and length of the ranked lists.")
    chains: int = Field(4, ge=1, description="Reasoning chains sampled for each user.")
    chain_beam_width: int = Field(50, ge=1, description="Beams after each chain.")
    batch_users: int = Field(64, ge=1, description="Users of one beam search.")
    examples: int = Field(5, ge=0, description="Recommendations to show.")


class ClusterSettings(Section):
    address: str | None = Field(None, description="Ray address; null uses RAY_ADDRESS, or starts Ray on this machine.")
    learner_cpus: float = Field(1, gt=0, description="CPUs of the learner's placement-group bundle.")
    rollout_cpus: float = Field(1, gt=0, description="CPUs of the rollout engine's bundle.")
    gpus_per_engine: float = Field(
        0, ge=0, description="GPUs of the learner's and of the rollout engine's bundle each."
    )
    threads: int = Field(2, ge=1, description="Compute threads of each actor; rollout and learning take turns.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Data type of the rollout engine.")
    kv_cache_mib: int = Field(256, ge=16, description="Key-value cache of the rollout engine, MiB.")
    rollout_sequences: int = Field(256, ge=1, description="Responses that the engine decodes at once.")
    index_workers: int = Field(
        1, ge=1, description="Actors of the Ray Data jobs that index and corpus.teacher ask for."
    )
    index_worker_cpus: float = Field(1, gt=0, description="CPUs of each of them.")
    index_worker_gpus: float = Field(0, ge=0, description="GPUs of each actor that embeds.")
    start_seconds: float = Field(300, gt=0, description="Deadline for an actor to start.")
    call_seconds: float = Field(1800, gt=0, description="Deadline for one call of an actor.")


class TrackingSettings(Section):
    uri: str | None = Field(None, description="MLflow tracking URI; null keeps SQLite in the run folder.")
    experiment: str = Field("gream", description="MLflow experiment.")


class Settings(Section):
    run_folder: str = Field("runs/run", description="Folder that holds everything of the run.")
    seed: int = Field(0, ge=0, description="Fixes the split, the index, the rows, the rollouts and the training.")
    data: DataSettings = Field(default_factory=DataSettings, description="Where items and interactions come from.")
    index: IndexSettings = Field(
        default_factory=IndexSettings, description="The index stage: semantic IDs of the items."
    )
    corpus: CorpusSettings = Field(default_factory=CorpusSettings, description="The corpus stage: rows and prompts.")
    model: ModelSettings = Field(default_factory=ModelSettings, description="The language model to start from.")
    sft: SupervisedSettings = Field(default_factory=SupervisedSettings, description="The supervised stage.")
    train: TrainSettings = Field(default_factory=TrainSettings, description="The SRPO stage.")
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="The evaluate stage.")
    cluster: ClusterSettings = Field(default_factory=ClusterSettings, description="Ray, placement and engines.")
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, description="MLflow.")

    @model_validator(mode="after")
    def _budgets_fit(self) -> Settings:
        depth = len(self.index.level_sizes) + 1
        if self.train.reasoning_budget < 2 * depth + 3:
            raise ValueError(
                f"train.reasoning_budget of {self.train.reasoning_budget} tokens cannot hold a closing; "
                f"set it to at least {2 * depth + 3}"
            )
        if self.train.mini_batch_prompts > self.train.prompts_per_step:
            raise ValueError("train.mini_batch_prompts must not exceed train.prompts_per_step")
        return self

    @model_validator(mode="after")
    def _low_rank_weights_have_a_base(self) -> Settings:
        if self.sft.low_rank is not None and self.model.checkpoint is None:
            raise ValueError("sft.low_rank needs model.checkpoint: a model from scratch has nothing to keep")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.run_folder)

    def dump(self) -> str:
        """The settings as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_settings(file: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file (defaults without one) and `key.path=value` overrides, values read as YAML.

    Raises InputError for a missing or broken file, an override without `=`, an unknown key (the nearest valid one is
    named), or a value outside its range.
    """
    values: Any = {}
    if file is not None:
        try:
            values = yaml.safe_load(Path(file).read_text()) or {}
        except FileNotFoundError:
            raise InputError("the settings file does not exist", file=file) from None
        except yaml.YAMLError as error:
            raise InputError(f"the settings file is not YAML: {error}", file=file) from None
        if not isinstance(values, dict):
            raise InputError("the settings file must be a mapping of keys to values", file=file)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise InputError(f"the override {override!r} is not of the form key=value", remedy="Write train.steps=10.")
        place = values
        *sections, last = key.strip().split(".")
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"{section!r} in the override {override!r} is a value, not a section")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"the value of the override {override!r} is not YAML") from None
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error), file=file, remedy="See `gream run --dry-run` for all keys.") from None


def _explain(error: ValidationError) -> str:
    """One line per problem; an unknown key names the nearest valid one."""
    lines = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _keys_at(path[:-1]), n=1, cutoff=0)
            lines.append(f"there is no key {'.'.join(path)!r}; the nearest one is {'.'.join([*path[:-1], *near])!r}")
        else:
            lines.append(f"{'.'.join(path) or 'settings'}: {problem['msg']}")
    return "; ".join(lines)


def _keys_at(path: Sequence[str]) -> list[str]:
    """Valid keys of a section."""
    section: Any = Settings
    for part in path:
        annotation = section.model_fields[part].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type)), annotation)
    return list(section.model_fields)
