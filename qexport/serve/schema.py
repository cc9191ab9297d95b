"""The body of ``POST /v1/images``, made from the sampling plans of the bundles that are served.

It is checked twice: here for shape and kind, with limits where all bundles agree on them; and by the bundle's plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, create_model

from qexport.plan import Input, Plan
from qexport.runtime.inputs import label_input
from qexport.runtime.noise import WORD_LIMIT
from qexport.serve.failures import BadRequestError, MalformedError
from qexport.serve.pictures import SINGLE, Format
from qexport.serve.settings import ServeSettings

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class ImagesRequest(BaseModel):
    """The fields that do not depend on the bundles; `request_model` completes it."""

    model_config = _STRICT

    labels: list[int]
    n: int | None = None
    seed: int = 0
    first_index: int = 0
    bundle: str | None = None
    schedule: str | None = None
    settings: Any = None
    format: Format = "png"
    timeout_s: float | None = None

    @property
    def classes(self) -> list[int]:
        """The class of each image: `labels` in turns."""
        count = len(self.labels) if self.n is None else self.n
        return [self.labels[i % len(self.labels)] for i in range(count)]

    @property
    def given_settings(self) -> dict[str, Any]:
        """Inputs of the plan that were given, by their names there."""
        if self.settings is None:
            return {}
        return self.settings.model_dump(by_alias=True, exclude_none=True)


def request_model(plans: Mapping[str, Plan], limits: ServeSettings) -> type[ImagesRequest]:
    """The body's type for the bundles named."""
    names = tuple(plans)
    schedules = sorted({name for plan in plans.values() for name in plan.schedules})
    one_bundle: Any = Literal[names]
    one_schedule: Any = Literal[tuple(schedules)] if schedules else None
    word = Field(default=0, ge=0, lt=WORD_LIMIT, description="with an image's number it decides the noise")
    count = Field(default=None, ge=1, le=limits.max_images, description="images; as many as labels if left out")
    settings = create_model("Settings", __config__=_STRICT, **_settings(list(plans.values())))
    fields: dict[str, Any] = {
        "labels": (
            list[Annotated[int, WithJsonSchema({"type": "integer", **_label_limits(list(plans.values()))})]],
            Field(min_length=1, max_length=limits.max_images, description="classes; they take turns if n is larger"),
        ),
        "n": (int | None, count),
        "seed": (int, word),
        "first_index": (
            int,
            Field(default=0, ge=0, lt=WORD_LIMIT - limits.max_images, description="number of the first image"),
        ),
        "bundle": (one_bundle | None, Field(default=None, description=f"{names[0]} if left out")),
        "settings": (settings | None, Field(default=None, description="inputs of the sampling plan")),
        "timeout_s": (
            float | None,
            Field(default=None, gt=0, le=limits.deadline_s, description="answered 504 after that long"),
        ),
    }
    if schedules:
        fields["schedule"] = (one_schedule | None, Field(default=None, description="the bundle's default if left out"))
    return create_model("ImagesRequest", __base__=ImagesRequest, **fields)


def parse(model: type[ImagesRequest], body: bytes) -> ImagesRequest:
    """Read a body.

    Raises:
        MalformedError: it is not JSON.
        BadRequestError: a field is unknown, missing, of the wrong kind or out of range; the line names the first.
    """
    try:
        request = model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise MalformedError(f"the body is not JSON: {first['msg']}") from None
        where = ".".join(map(str, first["loc"])) or "the body"
        raise BadRequestError(f"{where}: {first['msg']}") from None
    if request.format in SINGLE and len(request.classes) > 1:
        raise BadRequestError(f"format: {request.format} holds one image; for several ask for grid or npz")
    return request


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of the body without references, so that it can stand anywhere."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inlined(definitions[node["$ref"].rpartition("/")[2]])
            return {key: inlined(value) for key, value in node.items()}
        return [inlined(item) for item in node] if isinstance(node, list) else node

    return inlined(schema)


def _settings(plans: Sequence[Plan]) -> dict[str, Any]:
    """A field for each input of the plans but the labels; called by its place, as any name may occur as an alias."""
    found: dict[str, list[Input]] = {}
    for plan in plans:
        for spec in plan.inputs:
            if spec is not label_input(plan):
                found.setdefault(spec.name, []).append(spec)
    return {f"setting_{i}": _field(specs, len(plans)) for i, specs in enumerate(found.values())}


def _label_limits(plans: Sequence[Plan]) -> dict[str, int]:
    """The classes that any of the bundles takes, for readers of the description; each bundle checks its own."""
    ports = [port for port in map(label_input, plans) if port is not None]
    lowest = [port.minimum for port in ports if port.minimum is not None]
    highest = [port.maximum for port in ports if port.maximum is not None]
    found = {"minimum": lowest, "maximum": highest}
    ends = {"minimum": min, "maximum": max}
    return {name: int(ends[name](limits)) for name, limits in found.items() if limits and len(limits) == len(ports)}


def _field(specs: Sequence[Input], bundles: int) -> tuple[Any, Any]:
    first = specs[0]
    kind = float if any(spec.dtype.startswith("float") for spec in specs) else int
    same = all((s.minimum, s.maximum) == (first.minimum, first.maximum) for s in specs)
    limits = {"ge": first.minimum, "le": first.maximum} if same else {}
    default = f"{first.default:g}" if first.default is not None else "required"
    where = "" if len(specs) == bundles else " (not every bundle takes it)"
    text = f"{first.doc or first.name}; default {default}{where}"
    known: Any = {name: limit for name, limit in limits.items() if limit is not None}
    return (kind | None, Field(default=None, alias=first.name, description=text, **known))
