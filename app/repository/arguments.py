"""The arguments of the library's methods: those of the wrong class are refused in one place.

Words, symbols, times and numbers have checks of their own, which know more. Invariant: of an argument that is none of
what its parameter is annotated with, nothing reaches a statement.
"""

import inspect
from collections.abc import Callable, Coroutine, Sequence
from functools import wraps
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

from app.errors import InvalidRequest

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Fits = Callable[[Any], bool]


def checked(method: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """A method that refuses arguments of another class than the one their parameters are annotated with.

    Raises:
        InvalidRequest: an argument is of another class; from the method.
    """
    names = list(inspect.signature(method).parameters)
    rules = {
        name: rule
        for name, parameter in inspect.signature(method).parameters.items()
        if (rule := _rule(parameter.annotation)) is not None
    }

    @wraps(method)
    async def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
        for name, value in (*zip(names, arguments, strict=False), *options.items()):
            if name in rules and not rules[name][0](value):
                raise InvalidRequest(f"{name} is {rules[name][1]}.", parameter=name)
        return await method(*arguments, **options)

    return call


def _rule(annotation: Any) -> tuple[_Fits, str] | None:
    """What an argument has to be, and the words for it; None where the method looks itself."""
    if isinstance(annotation, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        rule = _rule(kinds[0]) if len(kinds) == 1 else None
        return None if rule is None else ((lambda value: value is None or rule[0](value)), f"{rule[1]}, or None")
    if get_origin(annotation) is Sequence:
        (kind,) = get_args(annotation)
        return (
            lambda given: isinstance(given, (list, tuple)) and all(isinstance(one, kind) for one in given)
        ), f"a list of {kind.__name__}"
    if annotation is bool:
        return (lambda value: isinstance(value, bool)), "true or false"
    if isinstance(annotation, type) and annotation.__module__.startswith("app."):
        return (lambda value: isinstance(value, annotation)), f"a {annotation.__name__}"
    return None
