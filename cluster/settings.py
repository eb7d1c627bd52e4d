"""Every setting of a run, with its meaning and unit. Defaults are the paper's; presets in `configs/` fit a machine."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from cluster.data_settings import CorpusSettings, DataSettings, IndexSettings
from cluster.learning_settings import ContinuedSettings, ModelSettings, SupervisedSettings, TrainSettings
from cluster.section import Section
from cluster.serving_settings import ServingSettings
from evaluation.baselines import COUNTING_BASELINES, BaselineName
from evaluation.chain_interventions import ChainIntervention
from item_index.constraint import MODES, Mode
from item_index.input_error import InputError


class EvaluationSettings(Section):
    part: Literal["test", "validation"] = Field("test", description="Which target of each user is evaluated.")
    checkpoints: tuple[Literal["sft", "sft_continued", "srpo"], ...] = Field(
        ("sft", "srpo"), min_length=1,
        description="Whose checkpoints are evaluated; `gream run` runs the stages that they need.",
    )  # fmt: skip
    modes: tuple[Mode, ...] = Field(
        MODES, min_length=1, description="Inference modes; without reasoning no rollout engine is started."
    )
    baselines: tuple[BaselineName, ...] = Field(
        COUNTING_BASELINES,
        description="Recommenders to compare with, tuned on the validation targets; sasrec and gru4rec take minutes.",
    )
    cold_share: float = Field(
        0.5, ge=0, le=1, description="Share of the catalogue, fewest interactions first, whose items count as cold."
    )
    users: int | None = Field(None, ge=1, description="Users to evaluate, drawn by the seed; all when null.")
    beam_width: int = Field(50, ge=50, description="Beams of direct mode, and length of the ranked lists.")
    chains: int = Field(4, ge=1, description="Reasoning chains sampled for each user.")
    samples: int | None = Field(
        None, ge=1,
        description="Reasoning responses sampled for each user, for pass@k; the first of them are the chains. Null is "
        "as many as chains.",
    )  # fmt: skip
    interventions: tuple[ChainIntervention, ...] = Field(
        (), description="What is done to the last checkpoint's chains, to see whether its answers hang on them."
    )
    chain_beam_width: int = Field(50, ge=1, description="Beams after each chain.")
    batch_users: int = Field(64, ge=1, description="Users of one beam search.")
    examples: int = Field(5, ge=0, description="Recommendations to show.")

    @model_validator(mode="after")
    def _parts_fit(self) -> EvaluationSettings:
        if self.samples is not None and self.samples < self.chains:
            raise ValueError(f"evaluation.samples must be at least evaluation.chains, {self.chains}")
        if self.interventions and "reasoning" not in self.modes:
            raise ValueError("evaluation.interventions change reasoning chains: add reasoning to evaluation.modes")
        return self


class ClusterSettings(Section):
    address: str | None = Field(None, description="Ray address; null uses RAY_ADDRESS, or starts Ray on this machine.")
    rollout_engines: int = Field(1, ge=1, description="Rollout engines of the train and evaluate stages.")
    additional_engines: int = Field(
        0, ge=0, description="More of them for the train stage: each joins when there is a place, and leaves when lost."
    )
    learner_cpus: float = Field(1, gt=0, description="CPUs of the learner's placement-group bundle.")
    rollout_cpus: float = Field(1, gt=0, description="CPUs of each rollout engine's bundle.")
    gpus_per_engine: float = Field(
        0, ge=0, description="GPUs of each learner rank and of each device of a rollout engine; of a pair, colocated."
    )
    colocated: bool = Field(
        False, description="Pairs of an engine and a learner rank share their GPUs, both resident; or each has its own."
    )
    threads: int = Field(2, ge=1, description="Compute threads of each actor; rollout and learning take turns.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Data type of the rollout engine.")
    kv_cache_mib: int = Field(256, ge=16, description="Key-value cache of the rollout engine, MiB.")
    rollout_sequences: int = Field(256, ge=1, description="Responses that the engine decodes at once.")
    rollout_sampler: Literal["constrained", "plain"] = Field(
        "constrained",
        description="constrained leaves the full vocabulary alone inside semantic IDs; plain is vLLM's own sampler.",
    )
    weight_chunk_mib: int = Field(256, ge=1, description="Weights travel to the engine in chunks of about that size.")
    weight_transfer: Literal["object_store", "nccl", "ipc"] = Field(
        "object_store",
        description="How weights get to the engines: shared memory, or vLLM's NCCL, or its CUDA IPC on shared devices.",
    )
    tensor_parallel: int = Field(
        1, ge=1, description="Devices of one rollout engine; each counts gpus_per_engine and a process of its own."
    )
    model_runner: Literal["v1", "v2"] = Field(
        "v1", description="vLLM's model runner; v2 needs a GPU, and has not been run on one yet."
    )
    reward_workers: int = Field(1, ge=1, description="Actors that score rollouts.")
    reward_cpus: float = Field(0, ge=0, description="CPUs of each of them.")
    reward_grace_seconds: float = Field(
        60, gt=0, description="What a reward worker may take beside your own rewards before it counts as lost."
    )
    index_workers: int = Field(
        1, ge=1, description="Actors of the Ray Data jobs that index and corpus.teacher ask for."
    )
    index_worker_cpus: float = Field(1, gt=0, description="CPUs of each of them.")
    index_worker_gpus: float = Field(0, ge=0, description="GPUs of each actor that embeds.")
    ranking_gpus: float = Field(
        0, ge=0, description="GPUs of evaluation's beam search, beside those of its engines; 0 searches on the CPU."
    )
    maximum_restarts: int = Field(
        3, ge=0, description="Times in a row that an engine, a reward worker or the learner may be started anew."
    )
    health_seconds: float = Field(
        30, gt=0, description="Between two health checks of an engine that works, and the deadline of each."
    )
    wait_for_nodes_seconds: float = Field(
        0, ge=0, description="How long an autoscaler may take to bring nodes that are missing; 0 fails at once."
    )
    start_seconds: float = Field(300, gt=0, description="Deadline for an actor to start.")
    call_seconds: float = Field(1800, gt=0, description="Deadline for one call of an actor.")
    stop_seconds: float = Field(
        60, gt=0, description="What the step may take that SIGTERM or Ctrl-C lets the train stage finish."
    )
    state_storage: str | None = Field(
        None, description="Folder or URI (s3://, gs://, ...) of the train stage's states; null is the run folder."
    )

    @model_validator(mode="after")
    def _devices_fit(self) -> ClusterSettings:
        if self.weight_transfer != "object_store" and not self.gpus_per_engine:
            raise ValueError(
                f"cluster.weight_transfer {self.weight_transfer} needs GPUs: set cluster.gpus_per_engine, or "
                "leave it at object_store"
            )
        if self.weight_transfer != "object_store" and self.additional_engines:
            raise ValueError("engines can join in mid-run where cluster.weight_transfer is object_store alone")
        if self.colocated and self.tensor_parallel > 1:
            raise ValueError("cluster.colocated pairs an engine of one device with a rank: set tensor_parallel to 1")
        if self.colocated and self.gpus_per_engine not in (0, 1):
            raise ValueError("cluster.colocated shares one GPU between two processes: set gpus_per_engine to 1, or 0")
        return self


class TrackingSettings(Section):
    uri: str | None = Field(None, description="MLflow tracking URI; null keeps SQLite in the run folder.")
    experiment: str = Field("gream", description="MLflow experiment.")
    model: str | None = Field(None, description="Registered model; null is gream- and the run folder's name.")
    weights_mib: float = Field(
        512, ge=0, description="Checkpoints up to that size are copied into a model version; larger ones are named."
    )
    flush_seconds: float = Field(
        60, ge=0, description="How long the end of a command waits for what MLflow does not have yet, in all."
    )
    system_seconds: float = Field(10, ge=0, description="Between two samples of load and memory; 0 takes none.")
    sample_steps: int = Field(
        10, ge=0, description="Steps of the train stage between two tables of sampled responses; 0 makes none."
    )


class MachineSettings(Section):
    nodes: int = Field(1, ge=1, description="Nodes.")
    cpus: float = Field(2, gt=0, description="CPUs of each.")
    memory_gib: float = Field(16, gt=0, description="Memory of each, GiB.")
    gpus: int = Field(0, ge=0, description="GPUs of each.")
    gpu: str = Field("H100-80GB", description="Which; `gream plan` names the known ones where this is another.")
    gpu_memory_gib: float | None = Field(None, gt=0, description="Memory of such a GPU; null takes that of the name.")


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
    sft_continued: ContinuedSettings = Field(
        default_factory=ContinuedSettings, description="More supervised training, to compare SRPO with."
    )
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings, description="The evaluate stage.")
    serving: ServingSettings = Field(default_factory=ServingSettings, description="The service of a finished run.")
    cluster: ClusterSettings = Field(default_factory=ClusterSettings, description="Ray, placement and engines.")
    machine: MachineSettings = Field(
        default_factory=MachineSettings,
        description="What `gream plan` reckons with; runs look at the cluster.",
    )
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

    def flat(self) -> dict[str, str]:
        """Every setting as a line: its path with dots, and its value."""
        return _flat(self.model_dump(mode="json"))


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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


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
