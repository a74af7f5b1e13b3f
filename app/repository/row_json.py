"""JSON text of rows, built by the database: Python forwards bytes.

Invariant: what these expressions give is JSON: prices are numbers with all their digits and without trailing zeros,
times RFC 3339 with a `Z`, and what is absent is null.
"""

from typing import Final


def _instant(column: str) -> str:
    """JSON text of a timestamp in UTC with a Z; `to_json` of a plain timestamp is the fastest ISO 8601 there is."""
    return f"""rtrim(to_json({column} AT TIME ZONE 'UTC')::text, '"') || 'Z"'"""


def _number(column: str) -> str:
    return f"coalesce(trim_scale({column})::text, 'null')"


def _json(**members: str) -> str:
    """A concatenation that builds a JSON object: 0.8 ms for 600 quotes where json_build_object takes 1.4 ms."""
    parts = [f"""'{"{" if i == 0 else ","}"{name}":' || {value}""" for i, (name, value) in enumerate(members.items())]
    return " || ".join([*parts, "'}'"])


# Symbols need no escaping: their alphabet has no character that JSON escapes.
_SYMBOL: Final = """'"' || symbol || '"'"""
QUOTE: Final = _json(
    symbol=_SYMBOL,
    timestamp=_instant("timestamp"),
    price=_number("price"),
    bid=_number("bid"),
    ask=_number("ask"),
    bid_size="coalesce(bid_size::text, 'null')",
    ask_size="coalesce(ask_size::text, 'null')",
    volume="coalesce(volume::text, 'null')",
    source="coalesce(to_json(source)::text, 'null')",
)
_BAR_MEMBERS: Final = {
    "symbol": _SYMBOL,
    "timestamp": _instant("timestamp"),
    "open": _number("open"),
    "high": _number("high"),
    "low": _number("low"),
    "close": _number("close"),
    "volume": _number("volume"),
    "vwap": _number("round(turnover / nullif(volume, 0), 8)"),
    "count": "count::text",
}
BAR: Final = _json(**_BAR_MEMBERS, final="final::text")
SUMMARY: Final = _json(
    **_BAR_MEMBERS,
    range=_number("high - low"),
    change=_number("close - open"),
    change_percent=_number("round(100 * (close - open) / open, 4)"),
    final="final::text",
)
SYMBOL_SPAN: Final = _json(symbol=_SYMBOL, first=_instant("first_timestamp"), last=_instant("timestamp"))
