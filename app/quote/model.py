"""The quote as pydantic knows it: the same fields and rules for whoever checks one, and for OpenAPI."""

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema, create_model
from pydantic import Field as Described
from pydantic_core import PydanticCustomError

from app.quote import rules
from app.quote.fields import FIELDS, SCALE, SYMBOL_LENGTH, TEXT_LENGTH, Field, Kind

_RULES: Final[dict[Kind, str]] = {
    "symbol": f"1 to {SYMBOL_LENGTH} of `A-Z 0-9 . - = ^ / : _ & @ + $ # !` and single spaces between them; trimmed,"
    " lower case is raised.",
    "instant": "RFC 3339 with an offset and up to nine digits of fraction; with `precision`, also a number.",
    "price": f"Below 10^16, {SCALE} decimals. With `prices=positive` 0 counts as null.",
    "size": f"0 or more, below 10^16, {SCALE} decimals.",
    "text": f"Up to {TEXT_LENGTH} characters.",
}
_NUMBER: Final = {"anyOf": [{"type": "number"}, {"type": "string"}]}
_SCHEMAS: Final[dict[Kind, dict[str, Any]]] = {
    "symbol": {"type": "string"},
    "instant": {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "number"}]},
    "price": _NUMBER,
    "size": _NUMBER,
    "text": {"type": "string"},
}
_STORED: Final[dict[Kind, dict[str, Any]]] = {
    **_SCHEMAS,
    "instant": {"type": "string", "format": "date-time"},
    "price": {"type": "number"},
    "size": {"type": "number"},
}


def _checked(field: Field, value: object) -> Any:
    try:
        found, _ = rules.read(field.kind, value, None)
    except rules.Refused as refusal:
        rule = refusal.rule
    else:
        if field.kind != "symbol":
            return found
        if (name := rules.normal(found or "")) is not None:
            return name
        rule = rules.SYMBOL
    raise PydanticCustomError("quote", "{code}: {detail}", {"code": rule.code, "detail": rule.detail})


def _member(field: Field, schema: dict[str, Any], *, checked: bool) -> Any:
    steps: list[Any] = [WithJsonSchema(schema)]
    if checked:
        steps.append(BeforeValidator(partial(_checked, field)))
    kind: Any = Annotated[Any, *steps]
    unit = f" In {field.unit}." if field.unit else ""
    about: dict[str, Any] = {
        "description": f"{field.meaning} {_RULES[field.kind]}{unit}", "examples": [field.example]
    }  # fmt: skip
    if checked and not field.required:
        about["default"] = None
    return kind if field.required else kind | None, Described(**about)


if TYPE_CHECKING:

    class Quote(BaseModel):
        """One quote, as `FIELDS` has it."""

    class StoredQuote(BaseModel):
        """A stored quote, as `FIELDS` has it."""

else:
    Quote = create_model(
        "Quote",
        __config__=ConfigDict(extra="forbid"),
        __doc__="One quote: what was traded or offered for a symbol at an instant. It has a price, a bid or an ask.",
        **{field.name: _member(field, _SCHEMAS[field.kind], checked=True) for field in FIELDS},
    )
    StoredQuote = create_model(
        "StoredQuote",
        __doc__="A stored quote: every field present, null where there is none.",
        **{field.name: _member(field, _STORED[field.kind], checked=False) for field in FIELDS},
    )
