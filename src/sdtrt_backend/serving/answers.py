"""OpenAI's images API as text: what a request's body says, and what an answer does."""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import RequestError
from .ask import FIELDS, Ask, Facts, checked

MOST_PICTURES = 10  # of one request, as OpenAI has it
JSON_BYTES = 64 * 1024
FORM_BYTES = 32 * 1024 * 1024
HELD_BYTES = 256 * 1024 * 1024  # of pictures that a response named by their URL
HELD_S = 3600.0
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
ANSWERS = ("b64_json", "url")
# fields of OpenAI's that ask for nothing here, in the values that mean "as you like"
ANY = {"quality": ("auto", "standard"), "style": (), "background": ("auto",), "moderation": ("auto",), "stream": (False,)}
OWN = ("model", "n", "response_format", "output_format", "user")
EXAMPLE = 'expected a JSON object such as {"prompt": "a lighthouse"}'


class Refused(Exception):
    """An answer that is not 200, in OpenAI's shape."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None,
                 wait_s: float | None = None) -> None:
        super().__init__(message)
        kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.answer = JSONResponse({"error": {"message": message, "type": kind, "param": field, "code": code}}, status)
        if wait_s is not None:
            self.answer.headers["retry-after"] = str(max(1, round(wait_s)))


class Held:
    """Pictures in memory whose URLs were given out: for an hour, the newest 256 MiB of them."""

    def __init__(self) -> None:
        self.files: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()

    def add(self, data: bytes, form: str) -> str:
        name = f"{secrets.token_urlsafe(16)}.{form}"
        self.files[name] = (time.monotonic() + HELD_S, form, data)
        while sum(len(data) for _, _, data in self.files.values()) > HELD_BYTES:
            self.files.popitem(last=False)
        return name

    def get(self, name: str) -> Response:
        until, form, data = self.files.get(name, (0.0, "", b""))
        if until < time.monotonic():
            self.files.pop(name, None)
            raise Refused(404, "there is no such picture: it is held for an hour", "url")
        return Response(data, media_type=f"image/{form}")


def limited(request: Request, most: int) -> Request:
    """The request, whose body cannot be longer than ``most`` bytes."""
    left = most

    async def receive() -> Any:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise Refused(413, f"the request is longer than {most} bytes", None, "too_long")
        return message

    return Request(request.scope, receive)


async def read_json(request: Request) -> dict[str, Any]:
    """The body's object. Raises Refused."""
    try:
        given = json.loads(await limited(request, JSON_BYTES).body())
    except (ValueError, RecursionError):
        raise Refused(400, EXAMPLE) from None
    if not isinstance(given, dict):
        raise Refused(400, EXAMPLE)
    return given


async def read_form(request: Request) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fields and files of multipart/form-data. Its numbers are text."""
    try:
        async with limited(request, FORM_BYTES).form(max_files=2, max_fields=20, max_part_size=JSON_BYTES) as form:
            files = {name: await value.read() for name, value in form.items() if isinstance(value, UploadFile)}
            texts = {name: value for name, value in form.items() if isinstance(value, str)}
    except (MultiPartException, FormParserError) as error:
        raise Refused(400, f"expected multipart/form-data with an image ({error})") from None
    if "image" not in files:
        raise RequestError("image", "expected multipart/form-data with the file of an image")
    given: dict[str, Any] = {}
    for name, text in texts.items():
        try:
            given[name] = text if name == "prompt" else json.loads(text)
        except (ValueError, RecursionError):
            given[name] = text
    return given, files


def asks_of(given: Mapping[str, Any], files: Mapping[str, bytes], facts: Facts) -> tuple[list[Ask], str, bool]:
    """(asks, format of their files, whether the answer names URLs)."""
    fields = {name: value for name, value in given.items() if value is not None}
    valid = (*FIELDS, *OWN, *ANY, *(("strength",) if files else ()))
    for name in fields:
        if name not in valid:
            raise RequestError(name, f"unknown field {name[:60]!r}; valid: {', '.join(valid)}")
    for name, values in ANY.items():
        if name in fields and fields[name] not in values:
            raise RequestError(name, f"{name} is not taken: leave it out")
    if fields.get("model", facts.model) != facts.model:
        raise RequestError("model", f"model expects {facts.model!r}, which is the one that is served, or nothing")
    answer, form = fields.get("response_format", ANSWERS[0]), fields.get("output_format", "png")
    for name, value, known in (("response_format", answer, ANSWERS), ("output_format", form, tuple(FORMATS))):
        if value not in known:
            raise RequestError(name, f"{name} expects one of {', '.join(known)}")
    count = fields.get("n", 1)
    if type(count) is not int or not 1 <= count <= MOST_PICTURES:
        raise RequestError("n", f"n expects an integer from 1 to {MOST_PICTURES}")
    ask = checked({name: value for name, value in fields.items() if name in FIELDS}, facts)
    if files:
        ask = _edit(ask, fields, files, facts)
    return [replace(ask, seed=(ask.seed + i) % 2**63) for i in range(count)], form, answer == "url"


def _edit(ask: Ask, fields: Mapping[str, Any], files: Mapping[str, bytes], facts: Facts) -> Ask:
    for name in files:
        if name not in ("image", "mask"):
            raise RequestError(name, f"unknown file {name[:60]!r}; valid: image, mask")
        if name not in facts.edits:
            raise RequestError(name, f"{facts.pipeline} draws from no {name}: /v1/images/generations draws from a prompt")
    strength = fields.get("strength", 0.8)
    if type(strength) not in (int, float) or not 0.1 <= strength <= 1:
        raise RequestError("strength", "strength expects a number from 0.1 to 1")
    return replace(ask, image=files["image"], mask=files.get("mask"), strength=float(strength))
