"""The HTTP interface of the service: `POST /v1/recommend`, items, users, health, and the page."""

# Annotations are evaluated here: FastAPI reads those of functions that are made inside `build_api`.
import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, create_model, model_validator
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.util.metrics import Counter, Histogram

from actors import served_run
from actors.recommender import MILLISECONDS
from actors.served_run import UnknownId
from cluster.problem_details import Guard, Problem, answer_with_problems, event
from cluster.serving_settings import ServingSettings

PAGE = Path(__file__).parent / "page"
OPEN_PATHS = ("/healthz", "/readyz", "/page/", "/docs", "/openapi.json")
RETRY_PAUSE_SECONDS = 0.2
Result = TypeVar("Result")

Limit = Annotated[int, Query(ge=1, le=100)]
Words = Annotated[str, Query(min_length=1, max_length=256, description="Words of the title.")]
Identifier = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | Annotated[StrictStr, Field(min_length=1, max_length=256)]


class ItemModel(BaseModel):
    item_id: Identifier = Field(description="The catalogue's id.")
    title: str
    path: list[str] = Field(description="Tokens of its semantic ID, level by level.")
    description: str = ""
    categories: list[str] = []
    brand: str = ""
    score: float | None = Field(None, description="Log-probability of the item, of direct mode or merged over chains.")


class Versions(BaseModel):
    checkpoint: str
    index: str


class ChainModel(BaseModel):
    think: str = Field(description="The reasoning in words.")
    rewritten_history: list[ItemModel] = Field(description="What of the history the chain keeps.")


class RecommendResponse(BaseModel):
    items: list[ItemModel] = Field(description="Best first.")
    versions: Versions
    chains: list[ChainModel] = Field([], description="Of reasoning mode.")


class ProblemModel(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str
    title: str
    status: int
    detail: str


class _RecommendRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mode: Literal["direct", "reasoning"] = "direct"
    user_id: Identifier | None = Field(None, description="Whose interactions are the history, where none is given.")
    exclude_history: bool = Field(True, description="Do not recommend items of the history.")
    temperature: float = Field(1.0, gt=0, le=2, allow_inf_nan=False, description="Of the chains.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="Of the chains; null draws one.")
    stream: bool = Field(False, description="Answer with server-sent events: chain, restart, result, problem.")

    @model_validator(mode="after")
    def _one_history(self) -> "_RecommendRequest":
        if (self.user_id is None) == (self.history is None):  # type: ignore[attr-defined]
            raise ValueError("give either history or user_id")
        return self


def request_model(settings: ServingSettings) -> Any:
    """The body of a request, with the limits of the settings."""
    return create_model(
        "RecommendRequest", __base__=_RecommendRequest,
        k=(int, Field(10, ge=1, le=settings.beam_width, description="Items wanted.")),
        history=(
            Annotated[list[Identifier], Field(max_length=settings.maximum_history)] | None,
            Field(None, description="Item ids, the oldest first; may be empty."),
        ),
        exclude=(
            Annotated[list[Identifier], Field(max_length=settings.maximum_excluded)],
            Field([], description="Item ids not to recommend."),
        ),
        chains=(
            int,
            Field(settings.default_chains, ge=1, le=settings.maximum_chains, description="Chains of reasoning mode."),
        ),
    )  # fmt: skip


def build_api(settings: ServingSettings, direct: Any, reasoning: Any, keys: Sequence[bytes]) -> Any:
    """The ASGI application; `direct` and `reasoning` are the deployments' handles."""
    model = request_model(settings)
    problems: Any = {
        status: {"model": ProblemModel, "description": text, "content": {"application/problem+json": {}}}
        for status, text in {
            400: "The body is not JSON.", 401: "No accepted key.", 404: "No such item or user.",
            413: "The body is too large.", 422: "The request asks for what is not there.",
            429: "Too many requests wait; Retry-After says for how long.", 503: "No replica is there at the moment.",
            504: "The deadline has passed.",
        }.items()
    }  # fmt: skip
    api = FastAPI(title="GREAM recommendations", version="1", docs_url=None, redoc_url=None, responses=problems)
    answer_with_problems(api)
    requests = Counter("gream_serving_requests", description="Answers.", tag_keys=("mode", "status"))
    latency = Histogram(
        "gream_serving_latency_ms", description="Time to the whole answer.", boundaries=MILLISECONDS, tag_keys=("mode",)
    )

    async def asked(call: Callable[[], Awaitable[Result]], missing: int = 422) -> Result:
        """What a replica answers; where one is lost on the way, what another one does."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + settings.timeout_seconds
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    return await call()
            except RayActorError:
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
            except Exception as error:
                raise as_problem(error, settings, missing) from error

    async def chains_and_result(query: served_run.Query) -> AsyncIterator[tuple[str, Any]]:
        """The events of reasoning mode; where a replica is lost on the way, another one begins anew."""
        deadline = asyncio.get_running_loop().time() + settings.timeout_seconds
        while True:
            answers = reasoning.options(stream=True).recommend.remote(query)
            try:
                while True:
                    async with asyncio.timeout_at(deadline):
                        answer = await anext(answers, None)
                    if answer is None:
                        return
                    yield ("chain", answer) if "text" in answer else ("result", answer)
            except RayActorError:
                yield "restart", {}
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
            except Exception as error:
                raise as_problem(error, settings, 422) from error
            finally:
                answers.cancel()  # stops what is still being written, and does nothing after the end

    async def events_of(query: served_run.Query) -> AsyncIterator[tuple[str, Any]]:
        """The events of a request, counted when it has ended, also by the client's leaving."""
        started, status = time.monotonic(), 499
        try:
            if query.mode == "direct":
                yield "result", await asked(lambda: direct.recommend.remote(query))
            else:
                async for name, data in chains_and_result(query):
                    yield name, data
            status = 200
        except Problem as problem:
            status = problem.status
            raise
        finally:
            requests.inc(tags={"mode": query.mode, "status": str(status)})
            latency.observe(1000 * (time.monotonic() - started), tags={"mode": query.mode})

    async def written(events: AsyncIterator[tuple[str, Any]]) -> AsyncIterator[str]:
        try:
            async for name, data in events:
                yield event(name, data)
        except Problem as problem:  # the status is long out
            yield event("problem", problem.body())

    @api.post("/v1/recommend", response_model=RecommendResponse)
    async def recommend(request: model) -> Any:
        """Recommend items after a history."""
        query = served_run.Query(
            request.mode, request.k, None if request.history is None else tuple(request.history), request.user_id,
            tuple(request.exclude), request.exclude_history, request.chains, request.temperature, request.seed,
        )  # fmt: skip
        events = events_of(query)
        if request.stream:
            return StreamingResponse(written(events), media_type="text/event-stream")
        results = [data async for name, data in events if name == "result"]
        return JSONResponse(results[-1])

    @api.get("/v1/items/{item_id}", response_model=ItemModel)
    async def item(item_id: str) -> Any:
        """An item of the catalogue."""
        return JSONResponse(await asked(lambda: direct.item.remote(item_id), missing=404))

    @api.get("/v1/items", response_model=list[ItemModel])
    async def items(title: Words, limit: Limit = 10) -> Any:
        """Items whose title holds all the words."""
        return JSONResponse(await asked(lambda: direct.search.remote(title, limit)))

    @api.get("/v1/users")
    async def users(beginning: Annotated[str, Query(max_length=256)] = "", limit: Limit = 10) -> list[Identifier]:
        """Users whose id begins like this."""
        return await asked(lambda: direct.users.remote(beginning, limit))

    @api.get("/v1/users/{user_id}/history", response_model=list[ItemModel])
    async def history(user_id: str, limit: Limit = 20) -> Any:
        """The latest items of a user, the oldest first."""
        return JSONResponse(await asked(lambda: direct.history.remote(user_id, limit), missing=404))

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> dict[str, Versions]:
        """Which versions answer; 503 while a mode has no replica."""
        return {
            "direct": await asked(lambda: direct.versions.remote()),
            "reasoning": await asked(lambda: reasoning.versions.remote()),
        }

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    api.mount("/page", StaticFiles(directory=PAGE))
    return Guard(api, keys=keys, body_bytes=settings.body_kib * 1024, open_paths=OPEN_PATHS)


def as_problem(error: Exception, settings: ServingSettings, missing: int) -> Problem:
    """What a request is told of an error of the replicas; others are raised as they are."""
    later = {"Retry-After": str(settings.retry_after_seconds)}
    if isinstance(error, UnknownId):
        return Problem(missing, str(error.args and f"there is no {error.args[0]} {error.args[1]!r}"))
    if isinstance(error, BackPressureError):
        return Problem(429, "too many requests wait for this mode", headers=later)
    if isinstance(error, DeploymentUnavailableError):
        return Problem(503, "no replica of this mode is there at the moment", headers=later)
    if isinstance(error, TimeoutError):
        return Problem(504, f"no answer within {settings.timeout_seconds:g} s; what was begun has been stopped")
    raise error
