"""Answers and requests of the HTTP interface, as its OpenAPI description shows them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from archipel.serving.asked import Offer
from archipel.serving.limits import Limits


class Failure(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A clip or the job that makes it. Beyond OpenAI's fields: seed, strategy, guidance, steps, and warnings, sentences
    about a finished clip (an expert that was lost while it was made)."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    remixed_from_video_id: str | None
    error: Failure | None
    seed: int
    strategy: str
    guidance: float
    steps: int
    warnings: list[str]


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: bool


class Model(BaseModel):
    """Beyond OpenAI's fields: what clips it makes."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    seconds: list[str]
    sizes: list[str]
    takes_image: bool


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every refusal looks like."""

    error: Error


WHY = {
    400: "A value cannot be used; the message names it and what can be",
    401: "No key, or a wrong one",
    403: "Asked from a page of another origin, or under a foreign name",
    404: "No such video, or another key's",
    405: "Not with this method",
    408: "The request took too long to arrive",
    413: "The request is too large",
    415: "The body is neither JSON nor a form",
    429: "The queue is full (see Retry-After)",
    503: "The server cannot store anything now",
}


def answers(*codes: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for FastAPI's ``responses``."""
    return {code: {"model": ErrorAnswer, "description": WHY[code]} for code in codes}


def create_body(offer: Offer, limits: Limits) -> dict[str, Any]:
    """The request body of ``POST /v1/videos``, for this server's run."""
    properties: dict[str, Any] = {
        "prompt": {"type": "string", "minLength": 1, "maxLength": limits.prompt, "example": "a red ball bounces"},
        "model": {"type": "string", "enum": [offer.model]},
        "seconds": {"type": "string", "enum": [offer.seconds]},
        "size": {"type": "string", "enum": list(offer.sizes), "default": offer.size},
        "strategy": {"type": "string", "description": "top1, top2, full, ancestral, monolith, ..."},
        "guidance": {"type": "number", "minimum": 0, "maximum": 50, "description": "1 is off"},
        "steps": {"type": "integer", "minimum": 1, "maximum": limits.steps},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**53 - 1, "description": "drawn where it is left out"},
    }
    form, common = dict(properties), {"type": "object", "required": ["prompt"], "additionalProperties": False}
    if offer.takes_image:
        form["input_reference"] = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP"}
        properties["input_reference"] = {
            "type": "object",
            "properties": {"image_url": {"type": "string", "pattern": "^data:image/[a-z]+;base64,"}},
            "required": ["image_url"],
            "additionalProperties": False,
        }
    return {
        "required": True,
        "content": {
            "application/json": {"schema": {**common, "properties": properties}},
            "multipart/form-data": {"schema": {**common, "properties": form}},
        },
    }
