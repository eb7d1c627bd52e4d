"""Errors of the HTTP interface as problem details (RFC 9457), and the limits that hold before a request is read."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MEDIA_TYPE = "application/problem+json"
logger = logging.getLogger(__name__)


class Problem(Exception):
    """What went wrong with a request, and what its answer's headers say."""

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None, **members: Any) -> None:
        super().__init__(status, detail)
        self.status, self.detail, self.headers, self.members = status, detail, headers or {}, members

    def body(self) -> dict[str, Any]:
        """The problem's JSON."""
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, **self.members}

    def response(self) -> JSONResponse:
        """The problem as an answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers, media_type=MEDIA_TYPE)


def of_validation(error: RequestValidationError) -> Problem:
    """What a body or a parameter lacks, each with the place in the request; values are not repeated."""
    if any(one["type"] == "json_invalid" for one in error.errors()):
        return Problem(400, "the body is not JSON")
    errors = [
        {"in": str(one["loc"][0]), "pointer": "".join(f"/{part}" for part in one["loc"][1:]), "detail": one["msg"]}
        for one in error.errors()
    ]
    return Problem(422, "; ".join(f"{one['pointer'] or one['in']}: {one['detail']}" for one in errors), errors=errors)


def answer_with_problems(api: FastAPI) -> None:
    """Let all errors of an application be answered with problem details."""

    @api.exception_handler(Problem)
    async def problem(_request: Request, error: Problem) -> JSONResponse:
        return error.response()

    @api.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response()

    @api.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> JSONResponse:
        return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return Problem(500, "the service failed; its log says why").response()


class Guard:
    """In front of the application: keys, the size of bodies, and headers that keep browsers from doing more.

    Args:
        keys: accepted API keys; without any, none is asked for.
        open_paths: beginnings of paths that need no key.
    """

    def __init__(self, application: ASGIApp, *, keys: Sequence[bytes], body_bytes: int, open_paths: tuple[str, ...]):
        self.application, self.keys, self.body_bytes, self.open_paths = application, keys, body_bytes, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        headers = dict(scope["headers"])
        problem = self._refusal(scope["path"], headers)
        if problem is not None:
            await problem.response()(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.body_bytes:
                raise self._too_large()
            return message

        await self.application(scope, limited, _with_security_headers(send))

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Problem | None:
        if self.keys and not path.startswith(self.open_paths) and path != "/" and not self._knows(headers):
            return Problem(
                401, "an API key is wanted, as `Authorization: Bearer KEY`", headers={"WWW-Authenticate": "Bearer"}
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Problem:
        return Problem(413, f"a body may have {self.body_bytes} bytes at most")

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All keys are compared, each in constant time: how long it takes says nothing about them.
        known = [hmac.compare_digest(key, given.strip()) for key in self.keys]
        return scheme.lower() == b"bearer" and any(known)


def _with_security_headers(send: Send) -> Send:
    headers = [
        (b"x-content-type-options", b"nosniff"),
        (b"content-security-policy", b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"),
        (b"referrer-policy", b"no-referrer"),
    ]

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return sending


def event(name: str, data: Any) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
