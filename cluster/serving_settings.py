"""Settings of the service."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.section import Section


class ReplicaSettings(Section):
    minimum: int = Field(1, ge=1, description="Replicas that are always there.")
    maximum: int | None = Field(None, ge=1, description="Replicas that load may bring; null keeps to the minimum.")
    cpus: float = Field(0, ge=0, description="CPUs that Ray sets aside for each.")
    gpus: float = Field(0, ge=0, description="GPUs of each.")
    ongoing_requests: int = Field(
        128, ge=1, description="Requests that a replica works on at once; of direct mode, batches of such."
    )
    queued_requests: int = Field(256, ge=0, description="Requests that wait beyond these; more are refused (429).")

    @model_validator(mode="after")
    def _bounds_fit(self) -> ReplicaSettings:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum must be at least minimum, {self.minimum}")
        return self

    @property
    def most_replicas(self) -> int:
        """Replicas that load may bring."""
        return self.maximum or self.minimum

    @property
    def calls(self) -> int:
        """Calls under way at once from one interface to all replicas that load may bring."""
        return self.ongoing_requests * self.most_replicas


class ServingSettings(Section):
    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs key_variable.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    checkpoint: Literal["sft", "sft_continued", "srpo"] = Field(
        "srpo", description="Whose checkpoint of the run is served."
    )
    key_variable: str | None = Field(
        None, description="Environment variable with the accepted API keys, separated by commas; null wants no key."
    )
    beam_width: int = Field(50, ge=1, description="Beams of direct mode and after each chain; the longest list.")
    default_chains: int = Field(4, ge=1, description="Reasoning chains of a request that names no number.")
    maximum_chains: int = Field(16, ge=1, description="Reasoning chains that a request may ask for.")
    maximum_history: int = Field(1000, ge=1, description="Items of the history that a request may name.")
    maximum_excluded: int = Field(10_000, ge=0, description="Items that a request may exclude.")
    body_kib: int = Field(256, ge=1, description="Size of a request's body at most, KiB.")
    body_seconds: float = Field(10.0, gt=0, description="How long a request's body may take to arrive.")
    batch_users: int = Field(64, ge=1, description="Requests of one beam search at most.")
    batch_wait_ms: float = Field(
        2.0, ge=0, description="How long a beam search waits for more requests, where none runs."
    )
    timeout_seconds: float = Field(30.0, gt=0, description="Deadline of a request; what it started is stopped then.")
    retry_after_seconds: int = Field(1, ge=0, description="What a refused request is told to wait.")
    drain_seconds: float = Field(30.0, gt=0, description="What a replica that is stopped may take to end its requests.")
    api: ReplicaSettings = Field(
        default_factory=lambda: ReplicaSettings(ongoing_requests=1024), description="Replicas that speak HTTP."
    )
    direct: ReplicaSettings = Field(
        default_factory=lambda: ReplicaSettings(ongoing_requests=4), description="Replicas of direct mode."
    )
    reasoning: ReplicaSettings = Field(
        default_factory=lambda: ReplicaSettings(ongoing_requests=16, queued_requests=64),
        description="Replicas of reasoning mode.",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> ServingSettings:
        if self.host not in ("127.0.0.1", "localhost", "::1") and self.key_variable is None:
            raise ValueError(f"serving.host {self.host} can be reached from outside: name the keys by key_variable")
        if self.default_chains > self.maximum_chains:
            raise ValueError(f"serving.default_chains must not exceed maximum_chains, {self.maximum_chains}")
        return self
