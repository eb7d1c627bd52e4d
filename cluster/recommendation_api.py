"""The HTTP interface of the service: `POST /v1/recommend`, items, users, health, metrics, and the page."""

# Annotations are evaluated here: FastAPI reads those of functions that are made inside `build_api`.
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.util.metrics import Counter, Histogram

from actors import served_run
from actors.recommender import MILLISECONDS
from actors.request_batches import RequestBatches
from actors.served_run import UnknownId
from cluster import node_metrics
from cluster.problem_details import Guard, Problem, answer_with_problems, described, event
from cluster.recommendation_models import (
    Identifier,
    ItemModel,
    ItemResponse,
    ReadyResponse,
    RecommendResponse,
    request_model,
)
from cluster.serving_settings import ReplicaSettings, ServingSettings

PAGE = Path(__file__).parent / "page"
OPEN_PATHS = ("/", "/page/", "/docs", "/openapi.json", "/healthz", "/readyz")
RETRY_PAUSE_SECONDS = 0.2
REFUSED = {
    401: "No accepted key.", 408: "The body came too slowly.", 413: "The body is too large.",
    422: "The request asks for what is not there.", 429: "Too many requests wait; Retry-After says for how long.",
    503: "No answer within the deadline, or no replica is there; Retry-After says when to try again.",
}  # fmt: skip

Limit = Annotated[int, Query(ge=1, le=100, description="Results at most.")]
Words = Annotated[str, Query(min_length=1, max_length=256, description="Words of the title.")]
Beginning = Annotated[str, Query(max_length=256, description="Beginning of the user id.")]


def build_api(settings: ServingSettings, direct: Any, reasoning: Any, keys: Sequence[bytes]) -> Any:
    """The ASGI application; `direct` and `reasoning` are the deployments' handles."""
    refused = described(REFUSED)
    api = FastAPI(title="GREAM recommendations", version="1", docs_url=None, redoc_url=None, responses=refused)
    # The guard asks for the key; this only says so in the OpenAPI document.
    keyed = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False, scheme_name="key"))] if keys else [])
    answer_with_problems(api)
    requests = Counter("gream_serving_requests", description="Answers.", tag_keys=("mode", "status"))
    latency = Histogram(
        "gream_serving_latency_ms", description="Time to the whole answer.", boundaries=MILLISECONDS, tag_keys=("mode",)
    )

    async def asked(call: Callable[[], Any], missing: int = 422) -> Any:
        """What a replica answers; where one is lost on the way, what another one does."""
        deadline = asyncio.get_running_loop().time() + settings.timeout_seconds
        while True:
            response = call()
            try:
                async with asyncio.timeout_at(deadline):
                    return await response
            except RayActorError:
                await asyncio.sleep(RETRY_PAUSE_SECONDS)
            except (TimeoutError, asyncio.CancelledError) as error:  # or the client has gone
                response.cancel()
                raise as_problem(error, settings, missing) from error
            except Exception as error:
                raise as_problem(error, settings, missing) from error

    async def recommended(queries: list[served_run.Query]) -> list[Any]:
        return await asked(lambda: direct.recommend.remote(queries))

    # One call for many requests: each costs Serve and both processes about as much as a beam search.
    direct_requests = RequestBatches(recommended, most=settings.batch_users, at_once=settings.direct.calls)
    reasoning_places = Places(settings.reasoning)

    async def direct_result(query: served_run.Query) -> Any:
        """What direct mode answers. A request whose client leaves before its call is made costs nothing."""
        # The next call's first request waits too, if only for an instant: without any place to wait none would be sent.
        if len(direct_requests.waiting) >= max(1, settings.direct.queued_requests):
            raise as_problem(NoPlace(), settings, 422)
        try:
            async with asyncio.timeout(settings.timeout_seconds):
                answer = await direct_requests.result(query)
        except TimeoutError as error:
            raise as_problem(error, settings, 422) from error
        if isinstance(answer, UnknownId):
            raise as_problem(answer, settings, 422)
        return answer

    async def chains_and_result(query: served_run.Query) -> AsyncIterator[tuple[str, Any]]:
        """The events of reasoning mode; where a replica is lost on the way, another one begins anew."""
        deadline = asyncio.get_running_loop().time() + settings.timeout_seconds
        try:
            await reasoning_places.take(deadline)
        except (NoPlace, TimeoutError) as error:
            raise as_problem(error, settings, 422) from error
        try:
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
                except (TimeoutError, asyncio.CancelledError, GeneratorExit) as error:  # or the client has gone
                    answers.cancel()
                    raise as_problem(error, settings, 422) from error
                except Exception as error:
                    raise as_problem(error, settings, 422) from error
        finally:
            reasoning_places.give_back()

    async def events_of(query: served_run.Query) -> AsyncIterator[tuple[str, Any]]:
        """The events of a request, counted when it has ended, also by the client's leaving."""
        started, status = time.monotonic(), 499
        try:
            if query.mode == "direct":
                yield "result", await direct_result(query)
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

    async def written(first: tuple[str, Any], others: AsyncIterator[tuple[str, Any]]) -> AsyncIterator[str]:
        yield event(*first)
        try:
            async for name, data in others:
                yield event(name, data)
        except Problem as problem:  # the status is long out
            yield event("problem", problem.body())

    async def recommend(request: Any) -> Any:
        """Recommend items after a history."""
        events = events_of(request.query())
        if request.stream:
            first = await anext(events)  # a request that fails at once has its status
            return StreamingResponse(written(first, events), media_type="text/event-stream")
        results = [data async for name, data in events if name == "result"]
        return JSONResponse(results[-1])

    recommend.__annotations__["request"] = request_model(settings)
    keyed.post(
        "/v1/recommend", response_model=RecommendResponse,
        responses={400: described({400: "The body is not JSON."})[400], 200: {"content": {"text/event-stream": {}}}},
    )(recommend)  # fmt: skip

    @keyed.get("/v1/items/{item_id}", response_model=ItemResponse, responses=described({404: "No such item."}))
    async def item(item_id: str) -> Any:
        """An item of the catalogue."""
        return JSONResponse(await asked(lambda: direct.item.remote(item_id), missing=404))

    @keyed.get("/v1/items", response_model=list[ItemModel])
    async def items(title: Words, limit: Limit = 10) -> Any:
        """Items whose title holds all the words."""
        return JSONResponse(await asked(lambda: direct.search.remote(title, limit)))

    @keyed.get("/v1/users", response_model=list[Identifier])
    async def users(beginning: Beginning = "", limit: Limit = 10) -> Any:
        """Users whose id begins like this."""
        return JSONResponse(await asked(lambda: direct.users.remote(beginning, limit)))

    @keyed.get(
        "/v1/users/{user_id}/history", response_model=list[ItemModel], responses=described({404: "No such user."})
    )
    async def history(user_id: str, limit: Limit = 20) -> Any:
        """The latest items of a user, the oldest first."""
        return JSONResponse(await asked(lambda: direct.history.remote(user_id, limit), missing=404))

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @api.get("/readyz", response_model=ReadyResponse)
    async def readyz() -> Any:
        """Which versions answer; 503 while a mode has no replica."""
        both = await asyncio.gather(asked(lambda: direct.versions.remote()), asked(lambda: reasoning.versions.remote()))
        return JSONResponse(dict(zip(("direct", "reasoning"), both, strict=True)))

    @keyed.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics of this node's processes, for Prometheus."""
        return Response(await asyncio.to_thread(node_metrics.node_metrics), media_type=node_metrics.MEDIA_TYPE)

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @api.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "operations.html")

    api.include_router(keyed)
    api.mount("/page", StaticFiles(directory=PAGE))
    return Guard(
        api, keys=keys, body_bytes=settings.body_kib * 1024, body_seconds=settings.body_seconds, open_paths=OPEN_PATHS
    )


class NoPlace(Exception):
    """As many requests wait for a mode as may."""


class Places:
    """So many requests that work at once, and so many that wait for them. Serve has no part in this, since what it lets
    wait for a full replica stands before the lookups and `/readyz`, which cost next to nothing."""

    def __init__(self, settings: ReplicaSettings) -> None:
        self.working = asyncio.Semaphore(settings.calls)
        self.left = settings.calls + settings.queued_requests

    async def take(self, deadline: float) -> None:
        """Wait for a place to work. Raises NoPlace where there is none to wait, TimeoutError at the deadline."""
        if self.left == 0:
            raise NoPlace
        self.left -= 1
        try:
            async with asyncio.timeout_at(deadline):
                await self.working.acquire()
        except BaseException:
            self.left += 1
            raise

    def give_back(self) -> None:
        """Let the next one work."""
        self.left += 1
        self.working.release()


def as_problem(error: BaseException, settings: ServingSettings, missing: int) -> Problem:
    """What a request is told of an error of the replicas; others are raised as they are."""
    later = {"Retry-After": str(settings.retry_after_seconds)}
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UnknownId):
        return Problem(missing, str(cause))
    if isinstance(cause, (NoPlace, BackPressureError)):
        return Problem(429, "too many requests wait for this mode", headers=later)
    if isinstance(cause, DeploymentUnavailableError):
        return Problem(503, "no replica of this mode is there at the moment", headers=later)
    if isinstance(cause, TimeoutError):
        detail = f"no answer within {settings.timeout_seconds:g} s; what was begun has been stopped"
        return Problem(503, detail, headers=later)
    raise error
