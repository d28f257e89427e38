"""What is asked for and answered, in OpenAI's shape with a few parameters of our own; unknown ones are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arinar.class_names import Classes
from arinar.reading import parse_json
from arinar.runtime import Pipeline
from arinar.runtime.request import Sampling
from arinar.text import shown

from .errors import invalid, of_value, unknown

#: Images of one request.
MOST_IMAGES = 64
#: Previews of one image.
MOST_PREVIEWS = 256
#: Seeds that are drawn here can be written as a number by every program (JavaScript's hold 53 bits).
SEEDS = 1 << 32
#: Fields that are lists, and such as are text.
LISTS = ("labels", "indices")
TEXTS = ("model", "prompt", "size", "response_format", "output_format", "cfg_schedule", "sampling_steps", "schedule", "user")
#: What other programs call our parameters.
MEANT = {
    "num_inference_steps": "num_iter",
    "num_steps": "num_iter",
    "steps": "num_iter",
    "cfg_scale": "guidance_scale",
    "cfg": "guidance_scale",
    "class_labels": "labels",
    "class_id": "prompt",
    "label": "labels",
    "negative_prompt": "prompt",
    "num_images": "n",
    "index": "indices",
}


class ImageRequest(BaseModel):
    """The parameters that generating and editing share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="The served model's name; see /v1/models.")
    prompt: Annotated[str, Field(max_length=1000)] | int | None = Field(
        None, description="A class: its id, or its name where that is one class's alone."
    )
    labels: Annotated[list[int], Field(min_length=1, max_length=MOST_IMAGES)] | None = Field(
        None, description="Class ids, one for each image, -1 for none; in place of prompt and n."
    )
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES)] | None = Field(None, description="Images. [default: 1, or one a label]")
    size: str | None = Field(None, description="The model's own size, or auto.")
    response_format: Literal["b64_json"] | None = Field(None, description="Images come inside the answer.")
    output_format: Literal["png"] | None = None
    seed: int | None = Field(None, description="0..2**64-1. [default: a random one, told in the answer]")
    indices: Annotated[list[int], Field(max_length=MOST_IMAGES)] | None = Field(
        None, description="The images' places in the seed's sequence. [default: 0, 1, ...]"
    )
    guidance_scale: float | None = Field(None, description="Classifier-free guidance, at least 1.")
    cfg_schedule: str | None = Field(None, description="linear or constant: how guidance grows over the steps.")
    temperature: float | None = Field(None, description="Above 0; multiplies the std of what is drawn.")
    num_iter: int | None = Field(None, description="Outer steps.")
    sampling_steps: str | None = Field(None, max_length=100, description="Of a diffusion head: 100, ddim25, 25-5.")
    schedule: str | None = Field(None, max_length=200, description="cosine, or staged:TOKENSxSTEPS,...: another law, faster.")
    guidance_interval: tuple[float, float] | None = Field(
        None, description="Shares of known tokens: guided between them alone."
    )
    guidance_refresh: int | None = Field(None, description="Guided steps that share one unconditional branch; approximate.")
    stream: bool | None = Field(None, description="Server-sent events: each step, then the images.")
    partial_images: Annotated[int, Field(ge=0, le=MOST_PREVIEWS)] | None = Field(
        None, description="With stream: how often the unfinished images are shown."
    )
    user: str | None = Field(None, max_length=256, description="Goes into the log.")

    def classes(self, classes: Classes) -> list[int]:
        """The class of each image. Raises ApiError."""
        if self.labels is not None:
            if self.prompt not in (None, ""):
                raise invalid("prompt and labels are both given; labels holds the class of every image", "prompt")
            if self.n not in (None, len(self.labels)):
                raise invalid(f"n is {self.n} for {len(self.labels)} labels; leave it out: there is one image a label", "n")
            return self.labels
        if self.prompt in (None, ""):
            raise invalid("prompt is missing; give a class id or name (or labels, a list of ids)", "prompt", "missing")
        try:
            label = classes.label(self.prompt, "prompt")
        except ValueError as error:
            raise invalid(str(error), "prompt") from None
        return [label] * (self.n or 1)

    def sampling(self, pipeline: Pipeline, classes: Classes, **more: Any) -> Sampling:
        """The request as the runtime has it, defaults filled in. Raises ApiError naming the parameter that is wrong."""
        side = pipeline.config.img_size
        if self.size not in (None, "auto", f"{side}x{side}"):
            raise invalid(f"size is {self.size[:40]!r}; this model makes {side}x{side}", "size")
        if self.partial_images and not self.stream:
            raise invalid("partial_images has a meaning with stream alone", "partial_images")
        labels = self.classes(classes)
        try:
            return pipeline.resolve(
                labels,
                guidance_scale=self.guidance_scale,
                cfg_schedule=self.cfg_schedule,
                temperature=self.temperature,
                num_iter=self.num_iter,
                sampling_steps=self.sampling_steps,
                seed=random.SystemRandom().randrange(SEEDS) if self.seed is None else self.seed,
                indices=self.indices,
                schedule=self.schedule,
                guidance_interval=self.guidance_interval,
                guidance_refresh=self.guidance_refresh,
                **more,
            )
        except ValueError as error:
            raise of_value(error, type(self).model_fields) from None

    def previews(self, num_iter: int) -> set[int]:
        """The steps at which the images are shown: spread evenly, the last one's are the images themselves."""
        count = min(self.partial_images or 0, num_iter - 1)
        return {round(part * num_iter / (count + 1)) for part in range(1, count + 1)} - {0, num_iter}


class GenerationRequest(ImageRequest):
    """`POST /v1/images/generations`."""


class EditRequest(ImageRequest):
    """`POST /v1/images/edits`: a form, with the files image and mask beside these fields."""

    grow: Annotated[int, Field(ge=0)] | None = Field(None, description="So many tokens more around the mask.")
    paste: bool | None = Field(None, description="Outside the mask, the very pixels that were given. [default: true]")


class ImageDatum(BaseModel):
    """An image and all that it takes to make it again: with `Pipeline.generate([label], seed=seed, indices=[index],
    batch_size=...)` and the answer's settings; with `Pipeline.edit`, its picture and its mask, where it was edited."""

    b64_json: str
    url: None = None
    revised_prompt: None = None
    seed: int
    index: int
    label: int
    class_name: str | None = None


class Settings(BaseModel):
    """What else the images depend on; some heads have more."""

    model_config = ConfigDict(extra="allow")

    guidance_scale: float
    cfg_schedule: str
    temperature: float
    num_iter: int
    batch_size: int


class ImagesAnswer(BaseModel):
    """OpenAI's answer, and ours beside it."""

    created: int
    model: str
    size: str
    output_format: str = "png"
    settings: Settings
    data: list[ImageDatum]


Request = TypeVar("Request", bound=ImageRequest)


def parse_body(kind: type[Request], body: bytes, content_type: str | None) -> Request:
    """A JSON body as a request. Raises ApiError."""
    # (A browser sends other types across origins without asking the server first.)
    if (content_type or "").partition(";")[0].strip().lower() != "application/json":
        raise invalid("the body must be JSON: send Content-Type: application/json", None, "unsupported_media_type")
    try:
        data = parse_json(body.decode("utf-8"))
    except ValueError as error:
        raise invalid(f"the body is no JSON: {error}", None, "invalid_json") from None
    if not isinstance(data, dict):
        raise invalid("the body is no JSON object", None, "invalid_json")
    return checked(kind, data)


def checked(kind: type[Request], data: Mapping[str, Any]) -> Request:
    """Parameters as a request. Raises ApiError for the first that is unknown or wrong."""
    for name in data:
        if name not in kind.model_fields:
            raise unknown(str(name), kind.model_fields, MEANT)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # (Of a choice of types pydantic tells all: the place's first word is the parameter.)
        param = str(first["loc"][0])
        where = "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
        expected = first["msg"].replace("Input should", "it should")
        raise invalid(f"{param}{where} is {shown(first['input'])}; {expected}", param) from None


def parse_form(kind: type[Request], fields: list[tuple[str, str]]) -> Request:
    """A form's fields as a request: numbers and truth values are text there, a list's items come one by one, or between
    commas. Raises ApiError."""
    data: dict[str, Any] = {}
    for name, text in fields:
        if name in LISTS:
            data.setdefault(name, []).extend(_scalar(item) for item in text.split(","))
        elif name in data:
            raise invalid(f"{name} is given twice", name)
        else:
            data[name] = text if name in TEXTS else _scalar(text)
    return checked(kind, data)


def _scalar(text: str) -> Any:
    """A number or a truth value that a field's text writes out, or the text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, (int, float)) else text
