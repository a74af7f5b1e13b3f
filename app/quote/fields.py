"""The fields of a quote, stated once.

All else about them follows from `FIELDS`: the columns of a batch, the struct of a row, the lists of columns in SQL and
their JSON, the stored object, OpenAPI, the names that files may use. A further nullable field is a line here, a
migration that adds its column to `quotes.real_time` and `quotes.latest`, and a line in docs/api.md.
Invariant: the order here is that of the columns of both tables.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

import pyarrow as pa

Kind = Literal["symbol", "instant", "price", "size", "text"]

#: What a decimal keeps: 16 digits before the point, `SCALE` after it.
PRECISION: Final = 28
SCALE: Final = 12
#: The longest symbol and the longest text, in characters.
SYMBOL_LENGTH: Final = 64
TEXT_LENGTH: Final = 255


@dataclass(frozen=True, slots=True)
class Field:
    """A field: its name, what it is and in which unit, other names that it goes by, whether a quote must have it."""

    name: str
    kind: Kind
    meaning: str
    unit: str
    example: Any
    aliases: tuple[str, ...] = ()
    required: bool = False


_MONEY: Final = "what the symbol is priced in"
_UNITS: Final = "units of the symbol"
FIELDS: Final = (
    Field("symbol", "symbol", "What is quoted.", "", "AAPL", ("ticker",), required=True),
    Field(
        "timestamp", "instant", "When.", "nanoseconds in UTC", "2026-11-20T14:30:00.123456789Z", ("time", "ts"),
        required=True,
    ),
    Field("price", "price", "Price of a trade; null where nothing was traded.", _MONEY, 189.98, ("last", "last_price")),
    Field("bid", "price", "Best bid; null where nobody bids.", _MONEY, 189.97, ("bid_price",)),
    Field("ask", "price", "Best ask; null where nobody offers.", _MONEY, 189.99, ("ask_price",)),
    Field("bid_size", "size", "Size at the best bid.", _UNITS, 300),
    Field("ask_size", "size", "Size at the best ask.", _UNITS, 200),
    Field("volume", "size", "Size of the trade.", _UNITS, 100),
    Field("source", "text", "Where the quote came from.", "", "feed"),
)  # fmt: skip

NAMES: Final = tuple(field.name for field in FIELDS)
BY_NAME: Final[Mapping[str, Field]] = MappingProxyType({field.name: field for field in FIELDS})
REQUIRED: Final = tuple(field.name for field in FIELDS if field.required)
#: Other names that a field may have in a request, as feeds and data frames call it.
ALIASES: Final[Mapping[str, str]] = MappingProxyType({alias: field.name for field in FIELDS for alias in field.aliases})
PRICES: Final = tuple(field.name for field in FIELDS if field.kind == "price")
SIZES: Final = tuple(field.name for field in FIELDS if field.kind == "size")
NUMBERS: Final = tuple(field.name for field in FIELDS if field.kind in {"price", "size"})
TEXTS: Final = tuple(field.name for field in FIELDS if field.kind == "text")

DECIMAL: Final = pa.decimal128(PRECISION, SCALE)
INSTANT: Final = pa.timestamp("us", "UTC")
NANOS: Final = "nanos"
#: The columns of `quotes.real_time`. An instant is two of them: its microsecond, and the nanoseconds after it.
COLUMNS: Final = pa.schema(
    [
        column
        for field in FIELDS
        for column in (
            [pa.field(field.name, INSTANT), pa.field(NANOS, pa.int16())]
            if field.kind == "instant"
            else [pa.field(field.name, DECIMAL if field.kind in {"price", "size"} else pa.string())]
        )
    ]
)
KEY: Final = ("symbol", "timestamp", NANOS)
#: The columns beside the key.
VALUES: Final = tuple(name for name in COLUMNS.names if name not in KEY)

#: Columns that pandas adds for an index without a name: to Arrow and Parquet, and when it reads again what it wrote.
_ADDED: Final = re.compile(r"__index_level_[0-9]+__|Unnamed: [0-9]+")


def is_added(name: object) -> bool:
    """Whether a column is one that a data frame's library adds by itself, and nobody means."""
    return isinstance(name, str) and _ADDED.fullmatch(name) is not None
