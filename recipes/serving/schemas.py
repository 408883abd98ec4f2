"""Describe the JSON of requests and answers: fields, types and limits, which the OpenAPI page shows."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, StrictStr, model_validator

# Letters of a name, and requests of a call.
MAX_NAME = 256
MAX_REQUESTS = 1024


class Refusal(Exception):
    """
    A request that gets no list.

    Args:
        status (`int`): Status code of HTTP.
        message (`str`): What was expected, what was found, what to do.
        field (`str`, *optional*): Field of the request. None: no single field is wrong.
        details: Further entries of the answer, for machines.
    """

    def __init__(self, status: int, message: str, field: str | None = None, **details: Any):
        super().__init__(message)
        self.status = status
        self.message = message
        self.field = field
        self.details = details


class NoList(Refusal):
    """A request for which no item is left. Among many, it gets an empty list, as from the pipeline."""


def as_seconds(value: Any) -> Any:
    """Turn a date in ISO 8601 into seconds since 1970 (without a zone: UTC); other values pass."""
    if not isinstance(value, str):
        return value
    moment = datetime.fromisoformat(value)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def check_count(requests: Any) -> Any:
    """Refuse too many requests before each of them is checked."""
    if isinstance(requests, list) and len(requests) > MAX_REQUESTS:
        raise ValueError(f"`requests` must be at most {MAX_REQUESTS}, got {len(requests)}. Split the call.")
    return requests


# Lists end at their first error, and True is no number.
ItemId = StrictStr | StrictInt
Items = Annotated[list[ItemId], Field(fail_fast=True)]
Names = Annotated[list[StrictStr], Field(fail_fast=True)]
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(as_seconds)]
Times = Annotated[list[Seconds | None], Field(fail_fast=True)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_NAME)]


class Strict(BaseModel):
    """JSON without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class Request(Strict):
    """A request for one list; the answer is that of `pipeline("recommendation")`."""

    items: Items = Field(description="Item ids of the history, oldest first. With known_items: only what is new.")
    behaviors: Annotated[list[StrictStr], Field(fail_fast=True)] | None = Field(
        None, description="A behavior for each item."
    )
    timestamps: Times | None = Field(
        None, description="A time for each item: seconds since 1970, a date in ISO 8601, or null for unknown."
    )
    query_time: Seconds | None = Field(
        None, description="Time at which the list is wanted. Default: the last event's."
    )
    allowed_items: Items | None = Field(None, description="Recommend only these items. Default: all.")
    blocked_items: Items | None = Field(None, description="Recommend none of these items.")
    part: Name | None = Field(None, description="Named part of the catalog, such as a market. Default: all items.")
    num_return_sequences: StrictInt | None = Field(None, ge=1, description="Length of the list.")
    ranking_target: Name | None = Field(None, description="Ranking target that orders the list.")
    exclude_history: Annotated[bool, Field(strict=True)] | None = Field(
        None, description="Recommend no item of the history. Default: as the checkpoint says."
    )
    num_reasons: StrictInt = Field(0, ge=0, le=100, description="Most items that `because` names for each item.")
    user_id: Name | None = Field(None, description="Keep this user's history and cache for the next request.")
    known_items: StrictInt = Field(
        0, ge=0, description="Items at the start of the history that earlier requests of user_id have sent."
    )

    @model_validator(mode="after")
    def check_user(self) -> Self:
        """Refuse `known_items` without a user."""
        if self.known_items and self.user_id is None:
            raise ValueError("`known_items` must come with `user_id`, got none. Add it, or send the whole history.")
        return self

    @property
    def options(self) -> tuple:
        """What all requests of a batch have in common."""
        return (self.part, self.num_return_sequences, self.ranking_target, self.exclude_history, self.num_reasons)


class Requests(Strict):
    """Several requests, each with a list of its own."""

    requests: Annotated[list[Request], BeforeValidator(check_count)] = Field(min_length=1)


class Recommendation(BaseModel):
    """An item of a list; scores that the checkpoint lacks are left out."""

    item_id: str
    title: str | None
    score: float
    generation_score: float
    ranking_score: float
    dense_score: float | None = None
    transition_score: float | None = None
    because: list[str] | None = None


class Answer(BaseModel):
    """A list, best item first."""

    items: list[Recommendation]
    known_items: int | None = Field(description="Items of user_id's history that the server keeps now; null: none.")
    checkpoint: str = Field(description="The checkpoint that made the list.")


class Answers(BaseModel):
    """The lists of several requests, in their order."""

    answers: list[Answer]


class Problem(BaseModel):
    """What is wrong with a request."""

    row: int | None = Field(description="Place among `requests`, from 0; null for a single request.")
    field: str | None
    msg: str


class Problems(BaseModel):
    """The problems of a call, at most ten."""

    detail: list[Problem]


class ItemList(Strict):
    """Item ids."""

    items: Items


class Reload(Strict):
    """A checkpoint to serve from now on."""

    checkpoint: Name = Field(description="Folder of the checkpoint, or a Hub repository.")
    allow_removed_items: Annotated[bool, Field(strict=True)] = Field(
        False, description="Take a checkpoint that lacks items of the present one."
    )


def problem(error: Refusal, row: int | None = None) -> dict:
    """Describe a refused request as an entry of `detail`."""
    return {"row": row, "field": error.field, "msg": error.message[:1000], **error.details}


def validation_problems(errors: Sequence[dict]) -> list[dict]:
    """
    Describe pydantic's errors as entries of `detail`: one for each field of a row, at most ten.

    Args:
        errors: Entries of `ValidationError.errors()`.
    """
    problems: dict[tuple, dict] = {}
    for error in errors:
        place = [part for part in error["loc"] if part not in ("body", "path")]
        row = None
        if place[:1] == ["requests"] and len(place) > 1 and isinstance(place[1], int):
            row = place[1]
            place = place[2:]
        field = place[0] if place and isinstance(place[0], str) else None
        position = f" (position {place[1]})" if len(place) > 1 and isinstance(place[1], int) else ""
        # A value that may have several types has an error for each.
        if not place:
            error = {"msg": "The body must be a JSON object, sent as application/json, got another. Check both."}
        message = f"{error['msg'].removeprefix('Value error, ')}{position}"[:1000]
        entry = problems.setdefault((row, field), {"row": row, "field": field, "msg": message})
        if message not in entry["msg"] and len(entry["msg"]) < 1000:
            entry["msg"] += f", or: {message}"
    return list(problems.values())[:10]
