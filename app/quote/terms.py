"""The terms on which quotes are taken and read, and the receipt of what became of them."""

from datetime import datetime, timedelta
from typing import Any, Final, Literal, Self, get_args

import msgspec

from app.clock import FIRST, LAST, Precision
from app.errors import InvalidRequest, Rejection

OnConflict = Literal["update", "merge", "ignore", "error"]
OnError = Literal["abort", "skip"]
Ties = Literal["replace", "number"]
Prices = Literal["positive", "signed"]
Consistency = Literal["eventual", "strong"]
#: How far ahead of the service's clock a quote may lie.
AHEAD: Final = timedelta(seconds=60)


def check_choice(value: object, choices: Any, parameter: str) -> None:
    """Refuse what is none of the words of a `Literal`.

    Raises:
        InvalidRequest: it is none.
    """
    words = get_args(choices)
    if not isinstance(value, str) or value not in words:
        raise InvalidRequest(
            f"{parameter} is {', '.join(map(repr, words[:-1]))} or {words[-1]!r}.", parameter=parameter
        )


class Limits(msgspec.Struct, frozen=True):
    """What one request may carry. Times are aware; a row outside [`oldest`, `newest`] is refused.

    `max_bytes` bounds what a body may become by decompression.
    """

    oldest: datetime = FIRST
    newest: datetime = LAST
    max_rows: int = 1_000_000
    max_days: int = 366
    max_bytes: int = 64 * 2**20

    @classmethod
    def at(
        cls,
        now: datetime,
        *,
        oldest: datetime | None = None,
        max_rows: int = 1_000_000,
        max_days: int = 366,
        max_bytes: int = 64 * 2**20,
    ) -> Self:
        """Limits at `now`: sixty seconds ahead at most, and not before `oldest`."""
        return cls(FIRST if oldest is None else max(FIRST, oldest), now + AHEAD, max_rows, max_days, max_bytes)


class Terms(msgspec.Struct, frozen=True):
    """On which terms the quotes of one request are taken.

    Attributes:
        limits: what it may carry.
        on_error: a row that breaks a rule aborts the request, or is skipped.
        on_conflict: of equal keys in the request the last one wins; with `merge` its nulls keep what an earlier one
            gave, with `ignore` the first one wins, and with `error` the later ones are refused.
        precision: the unit of timestamps that are numbers, counted from 1970-01-01T00:00Z; without it they are refused.
        ties: with `number` no two keys are equal, because the later one is moved on to the next free nanosecond.
        prices: with `positive` a price of 0 is an absent side and one below 0 refused; `signed` takes both as given.

    Raises:
        InvalidRequest: one of the words is none that is taken.
    """

    limits: Limits = Limits()
    on_error: OnError = "abort"
    on_conflict: OnConflict = "update"
    precision: Precision | None = None
    ties: Ties = "replace"
    prices: Prices = "positive"

    def __post_init__(self) -> None:
        check_choice(self.on_error, OnError, "on_error")
        check_choice(self.on_conflict, OnConflict, "on_conflict")
        if self.precision is not None:
            check_choice(self.precision, Precision, "precision")
        check_choice(self.ties, Ties, "ties")
        check_choice(self.prices, Prices, "prices")


class Receipt(msgspec.Struct, frozen=True):
    """What became of one request: `received = inserted + updated + unchanged + superseded + len(rejected)`.

    `unchanged` rows were stored already, or lost to a stored one under `on_conflict=ignore`; `superseded` rows lost to
    another row of the same key in the same batch. Of the rows that were not refused, `numbered` were moved on by
    `ties=number`, `rounded` counts values kept to twelve decimals, `zeros` counts prices of 0 taken for an absent side,
    `crossed` counts quotes whose bid is above their ask; all of these are stored.
    """

    received: int
    inserted: int
    updated: int = 0
    unchanged: int = 0
    superseded: int = 0
    numbered: int = 0
    rounded: int = 0
    zeros: int = 0
    crossed: int = 0
    rejected: list[Rejection] = []
