"""Errors of the HTTP interface as problem details (RFC 9457), and the limits that hold before a request is read."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MEDIA_TYPE = "application/problem+json"
SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {"type": "array", "description": "Of a request that does not fit: where, and why.", "items": {
            "type": "object", "required": ["in", "pointer", "detail"],
            "properties": {"in": {"type": "string"}, "pointer": {"type": "string"}, "detail": {"type": "string"}},
        }},
    },
}  # fmt: skip
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
]
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

    def response(self) -> Response:
        """The problem as an answer; in ASCII, for a detail may repeat what no encoding has, half a surrogate pair."""
        return Response(json.dumps(self.body()), self.status, headers=self.headers, media_type=MEDIA_TYPE)


def described(problems: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Answers of an operation for its OpenAPI description, by status."""
    return {
        status: {"description": text, "content": {MEDIA_TYPE: {"schema": SCHEMA}}} for status, text in problems.items()
    }


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
    async def problem(_request: Request, error: Problem) -> Response:
        return error.response()

    @api.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return of_validation(error).response()

    @api.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> Response:
        return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return Problem(500, "the service failed; its log says why").response()


class Guard:
    """In front of the application: keys, size and time of bodies, and headers that keep browsers from doing more.

    Args:
        keys: accepted API keys; without any, none is asked for.
        body_bytes, body_seconds: of a request's body at most.
        open_paths: paths that need no key, also what lies below those that end with a slash.
    """

    def __init__(
        self, application: ASGIApp, *, keys: Sequence[bytes], body_bytes: int, body_seconds: float,
        open_paths: Sequence[str],
    ) -> None:  # fmt: skip
        self.application, self.keys = application, keys
        self.body_bytes, self.body_seconds = body_bytes, body_seconds
        self.open_paths = frozenset(open_paths)
        self.open_folders = tuple(path for path in open_paths if path.endswith("/") and path != "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.application(scope, receive, send)
            return
        guarded = _with_security_headers(send)
        try:
            self._admit(scope["path"], dict(scope["headers"]))
            body = await self._read(receive)
        except Problem as problem:
            await problem.response()(scope, receive, guarded)
            return
        if body is not None:
            await self.application(scope, _after(body, receive), guarded)

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises Problem for a request that is refused by its headers."""
        is_open = path in self.open_paths or path.startswith(self.open_folders)
        if self.keys and not is_open and not self._knows(headers):
            raise Problem(
                401, "an API key is wanted, as `Authorization: Bearer KEY`", headers={"WWW-Authenticate": "Bearer"}
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.body_bytes:
            raise self._too_large()

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None where the client has gone. Raises Problem for one too large or too slow."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Problem(408, f"the body did not arrive within {self.body_seconds:g} s") from None

    def _too_large(self) -> Problem:
        return Problem(413, f"a body may have {self.body_bytes} bytes at most")

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All keys are compared, each in constant time: how long it takes says nothing about them.
        known = [hmac.compare_digest(key, given.strip()) for key in self.keys]
        return scheme.lower() == b"bearer" and any(known)


def _after(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application whose request's body has been read already."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receiving() -> Message:
        return left.pop() if left else await receive()

    return receiving


def _with_security_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *SECURITY_HEADERS]}
        await send(message)

    return sending


def event(name: str, data: Any) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
