"""Each decoder, fed with valid bodies that were changed by chance.

Invariant: a body follows from the seed, its format and its number alone.
"""

import random
from collections.abc import Sequence
from functools import partial
from typing import Final

from tests.hostile.bodies import ENCODINGS, TYPES, post, valid
from tests.hostile.striking import Attack
from tests.hostile.wire import Exchange

#: Bodies of each format and compression, at full size.
_BODIES: Final = 3000
_WORDS: Final = (
    b"NaN", b"Infinity", b"1e-2147483640", b"1e99999999999", b"null", b"\\ud800", b"\\u0000", b"\0", b"\xff",
    b"\xed\xa0\x80", b'"', b",", b"[",
    b"}", b"\n", b"\r", b"9" * 400, b"-", b".", b"e", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x80",
    b"\x01\0\0\0", b"PAR1", b"ARROW1",
)  # fmt: skip


def mutated(body: bytes, choice: random.Random) -> bytes:
    """A body with one to eight changes."""
    changed = bytearray(body)
    for _ in range(choice.choice((1, 1, 1, 2, 3, 8))):
        at = (
            choice.randrange(len(changed) + 1)
            if choice.random() < 0.7
            else max(0, len(changed) - choice.randrange(200))
        )
        length = choice.choice((1, 1, 2, 4, 8, 64))
        match choice.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([choice.randrange(256)])
            case 1 if at < len(changed):
                changed[at] ^= 1 << choice.randrange(8)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = choice.choice(_WORDS)
            case 4:
                word = choice.choice(_WORDS)
                changed[at : at + len(word)] = word
            case 5:
                changed[at:at] = changed[at : at + length] * choice.choice((1, 2, 100))
            case _:
                start = choice.randrange(len(changed) + 1)
                changed[at : at + length] = changed[start : start + length]
    return bytes(changed)


def fuzz(kind: str, choice: random.Random, scale: float) -> Sequence[Exchange]:
    """Changed bodies of a format: most as they are, some changed after they were compressed."""
    bases = [valid(rows)[kind] for rows in (1, 3, 40)]
    found = []
    for encoding, encode in ENCODINGS.items():
        for number in range(max(30, round(_BODIES * scale / (1 if encoding == "identity" else 3)))):
            base = choice.choice(bases)
            body = mutated(base, choice) if encoding == "identity" else mutated(encode(base), choice)
            query = choice.choice(("", "on_error=skip", "ties=number&precision=ns", "prices=signed&on_conflict=merge"))
            found.append(post(f"fuzz {kind} {encoding} {number}", body, kind, encoding=encoding, query=query))
    return found


ATTACKS: Final = [Attack(f"fuzz {kind}", partial(fuzz, kind), 4) for kind in TYPES]
