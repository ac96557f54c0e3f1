"""What to do with a value that a context can't hold, whichever library it is of; none of them is imported."""

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
