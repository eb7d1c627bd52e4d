"""What requests to the service and its answers look like; the OpenAPI document is made from it."""

# Annotations are evaluated: Pydantic makes models of them while the service starts.
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from actors.served_run import Query
from cluster.serving_settings import ServingSettings

Number = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=256)]
Identifier = Number | Name


class ItemModel(BaseModel):
    item_id: Identifier = Field(description="The catalogue's id.")
    title: str = Field(description="The catalogue's title.")
    path: list[str] = Field(description="Tokens of its semantic ID, level by level.")
    description: str = Field("", description="The catalogue's description; may be empty.")
    categories: list[str] = Field([], description="The catalogue's categories.")
    brand: str = Field("", description="The catalogue's brand; may be empty.")
    score: float | None = Field(None, description="Log-probability of the item, of direct mode or merged over chains.")


class Versions(BaseModel):
    checkpoint: str = Field(description="Stage that wrote the checkpoint, and a hash of its weights.")
    index: str = Field(description="Hash of the index.")


class ItemResponse(ItemModel):
    versions: Versions


class ReadyResponse(BaseModel):
    direct: Versions
    reasoning: Versions


class ChainModel(BaseModel):
    think: str = Field(description="The reasoning in words.")
    rewritten_history: list[ItemModel] = Field(description="What of the history the chain keeps.")


class RecommendResponse(BaseModel):
    items: list[ItemModel] = Field(description="Best first; fewer than asked for where no more are left.")
    versions: Versions
    chains: list[ChainModel] = Field([], description="Of reasoning mode.")


class RecommendRequest(BaseModel):
    """A request without the limits of a service's settings; see `request_model`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    mode: Literal["direct", "reasoning"] = Field("direct", description="The items at once, or after chains.")
    user_id: Identifier | None = Field(None, description="Whose interactions are the history, where none is given.")
    history: list[Identifier] | None = Field(None, description="Item ids, the oldest first; may be empty.")
    k: int = Field(10, description="Items wanted.")
    exclude: list[Identifier] = Field([], description="Item ids not to recommend.")
    exclude_history: bool = Field(True, description="Do not recommend items of the history.")
    chains: int = Field(1, description="Chains of reasoning mode.")
    temperature: float = Field(1.0, ge=0.05, le=2, allow_inf_nan=False, description="Of the chains.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="Of the chains; null draws one.")
    stream: bool = Field(
        False, description="Answer with server-sent events: chain (new text), restart (of the text), result, problem."
    )

    @model_validator(mode="after")
    def _one_history(self) -> "RecommendRequest":
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either history or user_id")
        return self

    def query(self) -> Query:
        """What the replicas are asked."""
        history = None if self.history is None else tuple(self.history)
        return Query(
            self.mode, self.k, history, self.user_id, tuple(self.exclude), self.exclude_history, self.chains,
            self.temperature, self.seed,
        )  # fmt: skip


def request_model(settings: ServingSettings) -> Any:
    """`RecommendRequest` with the limits of the settings."""
    histories = Annotated[list[Identifier], Field(max_length=settings.maximum_history)]
    excluded = Annotated[list[Identifier], Field(max_length=settings.maximum_excluded)]
    fields = RecommendRequest.model_fields
    return create_model(
        "RecommendRequest", __base__=RecommendRequest,
        k=(int, Field(10, ge=1, le=settings.beam_width, description=fields["k"].description)),
        history=(histories | None, Field(None, description=fields["history"].description)),
        exclude=(excluded, Field([], description=fields["exclude"].description)),
        chains=(
            int,
            Field(
                settings.default_chains, ge=1, le=settings.maximum_chains, description=fields["chains"].description
            ),
        ),
    )  # fmt: skip
