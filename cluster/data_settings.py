"""Settings of the data, the index and the corpus."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cluster.section import Section


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
    removed_share: float = Field(
        0.3, ge=0, lt=1, description="Share of a history that its rewriting removes, the items with least evidence."
    )
    rewritten_history_items: int | None = Field(
        None, ge=1, description="Items that a rewritten history keeps at most, the best ones; no bound when null."
    )
    maximum_think_characters: int = Field(
        4000, ge=1, description="Characters of a trace's four steps above which it is rejected."
    )
    rl_holdout: float = Field(0.1, ge=0, lt=1, description="Share of train targets kept out of supervised rows for RL.")
    text_vocabulary: int = Field(600, ge=257, description="BPE tokens of a tokenizer that is trained from scratch.")
    teacher: TeacherSettings = Field(
        default_factory=TeacherSettings, description="Who writes reasoning traces, preferences and queries."
    )
