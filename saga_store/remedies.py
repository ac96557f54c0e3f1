"""What to do with a value that a context can't hold, whichever library it is of; none of them is imported."""

import reprlib
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from os import PathLike
from types import CoroutineType
from uuid import UUID

# By what their classes have, since the libraries needn't be there.
_MARKS = {
    "model_dump": 'store its .model_dump(mode="json"), and read it with .model_validate()',
    "__struct_fields__": "store msgspec.to_builtins() of it, and read it with msgspec.convert()",
    "__attrs_attrs__": "store attrs.asdict() of it, and convert what its fields hold",
    "__dataclass_fields__": "store dataclasses.asdict() of it, and convert what its fields hold",
    "_asdict": "store its ._asdict()",
}
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (CoroutineType, "await it"),
    (Enum, "store its .value"),
    ((UUID, Decimal, Fraction, PathLike), "store str() of it"),
    ((date, time), "store its .isoformat()"),
    (timedelta, "store its .total_seconds()"),
    (tuple, "use a list"),
    ((set, frozenset), "store sorted() of it, or a list"),
    ((bytes, bytearray, memoryview), "store base64.b64encode() of it, decoded, or a reference to where it is kept"),
    (complex, "store a list of its parts"),
    (Mapping, "store dict() of it"),
)


def remedy(value: object) -> str:
    """Return what to do, as an imperative."""
    for mark, words in _MARKS.items():
        if hasattr(type(value), mark):
            return words
    for kind, words in _KINDS:
        if isinstance(value, kind):
            return words
    return "convert it to str, int, float, bool, None, list or dict"


def remedy_for_context(value: object) -> str:
    """Return what to do with something that should have been a context."""
    if value is None:
        return "give an empty one as {}"
    if isinstance(value, str | bytes | bytearray):
        return "read JSON with json.loads()"
    if isinstance(value, list | tuple | set | frozenset):
        return 'put it under a key, such as {"items": [...]}'
    return remedy(value)


def key_remedy(key: object) -> str:
    """Return what to do with a key that is no string."""
    return "store its .value" if isinstance(key, Enum) else "store str() of it"


def show(value: object) -> str:
    """Return the value, shortened, and what it is."""
    if isinstance(value, CoroutineType):
        return f"the coroutine {value.__qualname__}(), which nobody has awaited"
    if isinstance(value, timedelta):
        return f"timedelta(seconds={value.total_seconds():g})"
    if isinstance(value, str) and "://" in value:
        return "a URL (str)"  # it may have a password in it
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def id_remedy(value: object) -> str:
    """Return what to do with something that should have been a UUID."""
    return "await it" if isinstance(value, CoroutineType) else "convert it with uuid.UUID()"


def text_remedy(value: object) -> str:
    """Return what to do with something that should have been a str."""
    if isinstance(value, CoroutineType):
        return "await it"
    if isinstance(value, bytes | bytearray):
        return "decode it"
    return "give it some characters" if value is None else "convert it with str(), or json.dumps()"


def duration_remedy(value: object) -> str:
    """Return what to do with something that should have been a timedelta that isn't negative."""
    seconds = value if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else 30
    return f"give one such as timedelta(seconds={seconds})"
