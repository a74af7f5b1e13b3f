"""JSON text of rows, built by the database: Python forwards bytes.

Invariant: what these expressions give is JSON: prices are numbers with all their digits and without trailing zeros,
times RFC 3339 with a `Z`, those of quotes with nine digits of fraction, and what is absent is null.
"""

from typing import Final

from app.quote.fields import FIELDS, Field


def _instant(column: str) -> str:
    """JSON text of a timestamp in UTC with a Z; `to_json` of a plain timestamp is the fastest ISO 8601 there is."""
    return f"""rtrim(to_json({column} AT TIME ZONE 'UTC')::text, '"') || 'Z"'"""


def _instant_nano(column: str, nanos: str) -> str:
    """JSON text of an instant in UTC, with nine digits of fraction and a Z; 0.3 us, of which the padding takes 0.1."""
    micros = f"""to_char({column} AT TIME ZONE 'UTC', '"\\""YYYY-MM-DD"T"HH24:MI:SS.US')"""
    return f"""{micros} || CASE {nanos} WHEN 0 THEN '000Z"' ELSE right((1000 + {nanos})::text, 3) || 'Z"' END"""


def _number(column: str) -> str:
    return f"coalesce(trim_scale({column})::text, 'null')"


def _json(**members: str) -> str:
    """A concatenation that builds a JSON object: 0.8 ms for 600 quotes where json_build_object takes 1.4 ms."""
    parts = [f"""'{"{" if i == 0 else ","}"{name}":' || {value}""" for i, (name, value) in enumerate(members.items())]
    return " || ".join([*parts, "'}'"])


# Symbols need no escaping: their alphabet has no character that JSON escapes.
_SYMBOL: Final = """'"' || symbol || '"'"""


def _member(field: Field) -> str:
    match field.kind:
        case "symbol":
            return _SYMBOL
        case "instant":
            return _instant_nano(field.name, "nanos")
        case "price" | "size":
            return _number(field.name)
        case "text":
            return f"coalesce(to_json({field.name})::text, 'null')"


QUOTE: Final = _json(**{field.name: _member(field) for field in FIELDS})
#: The volume-weighted average price of a bar.
VWAP: Final = "round(turnover / nullif(volume, 0), 16)"
_BAR_MEMBERS: Final = {
    "symbol": _SYMBOL,
    "timestamp": _instant("timestamp"),
    "open": _number("open"),
    "high": _number("high"),
    "low": _number("low"),
    "close": _number("close"),
    "volume": _number("volume"),
    "vwap": _number(VWAP),
    "count": "count::text",
}
BAR: Final = _json(**_BAR_MEMBERS, final="final::text")
SUMMARY: Final = _json(
    **_BAR_MEMBERS,
    range=_number("high - low"),
    change=_number("close - open"),
    change_percent=_number("CASE WHEN open > 0 THEN round(100 * (close - open) / open, 4) END"),
    final="final::text",
)
SYMBOL_SPAN: Final = _json(
    symbol=_SYMBOL,
    first=_instant_nano("first_timestamp", "first_nanos"),
    last=_instant_nano("timestamp", "nanos"),
)
