# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""What went wrong with a request, told in one line, and in the form that clients of each path read."""

import logging
from typing import Any

from starlette.responses import JSONResponse, Response

from .metrics import Metrics
from .worker import REQUEST_ERRORS, Late, Left, Overloaded


# Where errors have the form that OpenAI's clients read.
OPENAI_PATHS = "/v1/"
_CODES = {401: "invalid_api_key", 404: "not_found"}

logger = logging.getLogger(__name__)


def error_content(path: str, detail: str, status: int, code: str | None = None) -> dict[str, Any]:
    """
    What a reply says of an error: `{detail}`, or OpenAI's `{error: {message, type, param, code}}` below `/v1/`.

    Args:
        path (`str`):
            Path of the request.
        detail (`str`):
            What is wrong, in one line.
        status (`int`):
            Status of the reply.
        code (`str`, *optional*):
            OpenAI's code, if the status does not tell it.
    """
    if not path.startswith(OPENAI_PATHS):
        return {"detail": detail}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": detail, "type": kind, "param": None, "code": code or _CODES.get(status)}}


def status_and_detail(error: Exception, metrics: Metrics) -> tuple[int, str]:
    """Status and one line for what a request raised; what is not the request's own is logged and not told."""
    if isinstance(error, REQUEST_ERRORS):
        return 422, " ".join(str(error).split())
    if isinstance(error, Overloaded):
        return 503, str(error)
    if isinstance(error, Late):
        return 504, str(error)
    if isinstance(error, Left):
        metrics.left.inc()
        return 499, "the client has left"  # for the counters: nobody reads it
    logger.error("a request failed", exc_info=error)
    return 500, "an error inside the server, which its log tells"


def failure(error: Exception, metrics: Metrics, path: str) -> Response:
    """The reply to a request that raised an error. OpenAI's clients know a wrong request by 400."""
    status, detail = status_and_detail(error, metrics)
    if status == 422 and path.startswith(OPENAI_PATHS):
        status = 400
    return JSONResponse(error_content(path, detail, status), status, {"Retry-After": "1"} if status == 503 else None)
