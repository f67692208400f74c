"""Read objects of JSON files into typed classes; an error names the first wrong field in one sentence.

`JsonObject` is for files that this package writes: unknown fields are kept, and an object is written again in the order
in which it was read. `Options` is for files of other tools, of which only some fields matter.
"""

from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ErrorDetails

from gptq.errors import InputError

MAX_QUOTED = 80  # characters of a value in a message
T = TypeVar("T")


def _require_value(value: Any) -> Any:
    if value is None:
        raise ValueError("null")
    return value


def _require_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("control characters")
    return text


IfPresent = Annotated[T | None, BeforeValidator(_require_value)]  # None if the key is absent; null is refused
Count = Annotated[int, Field(ge=0, le=2**60)]
Printable = Annotated[str, AfterValidator(_require_printable)]


class JsonObject(BaseModel):
    """An object of a file that this package writes. Absent keys stay absent when written; unknown keys are kept."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    _order: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _keep_order(cls, values: Any, validate: "ModelWrapValidatorHandler[JsonObject]") -> "JsonObject":
        made = validate(values)
        if isinstance(values, dict):
            made._order = tuple(values)
        return made

    @model_serializer(mode="wrap")
    def _in_order(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        return {key: content[key] for key in self._order if key in content} | content

    def to_dict(self) -> dict[str, Any]:
        """Return the object as values that JSON can hold."""
        values: dict[str, Any] = self.model_dump(exclude_unset=True)
        return values


class Options(BaseModel):
    """An object of another tool's file. Only fields that matter are declared; a field's description is its rule."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


Object = TypeVar("Object", bound=JsonObject)
Chosen = TypeVar("Chosen", bound=Options)


def read_object(kind: type[Object], values: Any, where: str) -> Object:
    """Return `values`, read from a file that this package writes, as an object of class `kind`.

    Raises:
        InputError: `values` is not such an object; the message names the first wrong or missing field.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where} is damaged: {_explain_damage(_first_of(error))}") from error


def read_options(kind: type[Chosen], values: Any, where: str) -> Chosen:
    """Return the fields that matter of an object in another tool's file.

    Raises:
        InputError: `values` is not an object, or a field is wrong; the message names the field and its rule.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = _first_of(error)
        if not isinstance(values, dict):
            raise InputError(f"{where} is {_quoted(values)}, not an object") from error
        if not first["loc"]:  # a rule on several fields: the validator's own sentence
            raise InputError(f"{where} {first['ctx']['error']}") from error
        field = str(first["loc"][0])
        what = f"{field} {_quoted(values[field])}" if field in values else f"no {field}"
        raise InputError(f"{where} says {what}; {kind.model_fields[field].description}") from error


def _first_of(error: ValidationError) -> ErrorDetails:
    return error.errors(include_url=False)[0]


def _explain_damage(details: ErrorDetails) -> str:
    field = ".".join(map(str, details["loc"]))[:MAX_QUOTED]
    if details["type"] == "missing":
        return f"{field!r} is missing"
    if details["type"] == "model_type":
        return f"{_quoted(details['input'])} is not an object"
    return f"{field!r} is {_quoted(details['input'])}"


def _quoted(value: Any) -> str:
    return repr(value)[:MAX_QUOTED]
