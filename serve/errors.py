"""Errors as answers, in OpenAI's shape."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from arinar.text import printable

from .scheduler import QueueFull, Stopping, TookTooLong

#: Letters of a message in an answer.
MOST_LETTERS = 500


class ApiError(Exception):
    """An answer that says what was wrong. ``param``: the argument; ``code``: for programs; ``headers``: the answer's own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        message = printable(self, MOST_LETTERS)
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, round(seconds)))}


def as_answer(error: BaseException) -> ApiError:
    """What a client is told of an error. Of one that is not its own it learns no more than that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers=retry_after(error.seconds))
    if isinstance(error, Stopping):
        return ApiError(503, str(error), code="shutting_down", headers=retry_after(5))
    if isinstance(error, TookTooLong):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, FloatingPointError):
        return ApiError(
            500,
            "the model made values that are not finite; ask for less guidance, or another temperature",
            code="not_finite",
        )
    return ApiError(500, "the server failed; its log has the reason, under this answer's x-request-id", code="internal_error")


def of_value(error: ValueError, names: Iterable[str]) -> ApiError:
    """The runtime's own refusal of an argument, whose message begins with the argument's name."""
    found = re.match(r"[a-z_]+", str(error))
    word = found[0] if found else ""
    param = {"label": "labels", "image": "indices"}.get(word, word)
    return invalid(str(error), param if param in set(names) else None)


def unknown(name: str, names: Iterable[str], meant: Mapping[str, str]) -> ApiError:
    """The refusal of a parameter that does not exist; ``meant``: what other programs' names are called here."""
    choices = sorted(names)
    near = [meant[name]] if name in meant else difflib.get_close_matches(name, choices, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(choices)}"
    return invalid(f"unknown parameter {printable(name, 60)!r}; {hint}", printable(name, 60), "unknown_parameter")
