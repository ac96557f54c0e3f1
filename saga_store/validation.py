"""What may be stored: the one place where input is refused, before any storage sees it."""

import json
import math
import re
import reprlib
from collections.abc import Iterable
from datetime import timedelta
from enum import StrEnum
from typing import Any, TypeVar, cast, get_args
from uuid import UUID

from saga_store.errors import InvalidSagaDataError
from saga_store.model import Context, LogStep, SagaStatus, SagaStepStatus, StepAction
from saga_store.remedies import duration_remedy, id_remedy, key_remedy, remedy, remedy_for_context, show, text_remedy

MAX_NAME_LENGTH = 255
MAX_CONTEXT_DEPTH = 500
# PostgreSQL cuts off what is longer, and would then talk of another schema.
MAX_IDENTIFIER_BYTES = 63
MAX_INT4 = 2**31 - 1
# Of one context, as JSON text. PostgreSQL's own limit is 1 GB, for all the contexts of a statement together.
DEFAULT_MAX_CONTEXT_BYTES = 64 * 2**20
_MOST_CONTEXT_BYTES = 512 * 2**20
_A_CENTURY = timedelta(days=36525)
_MAX_INT8 = 2**63 - 1
_FIRST_UNREADABLE_INT = 10**4300  # Python's own limit for reading an integer back from text

# Two characters to Python, which JSON would give back as one.
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

# Contexts that contain themselves are refused before: they are too deep.
_ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":"))
_ACTIONS = frozenset(get_args(StepAction))
_MOST_KEYS_SHOWN = 20
_SCALARS = frozenset({str, int, float, bool, type(None)})
_ESCAPED_SURROGATE = r"\ud"  # also of a character beyond the BMP, which is fine

_Status = TypeVar("_Status", bound=StrEnum)


def valid_id(saga_id: object) -> UUID:
    if not isinstance(saga_id, UUID):
        raise InvalidSagaDataError("saga_id", f"must be a uuid.UUID, not {show(saga_id)}; {id_remedy(saga_id)}")
    return saga_id


def valid_name(field: str, name: object) -> str:
    text = valid_text(field, name)
    if not text:
        raise InvalidSagaDataError(field, f"must not be empty; give it 1 to {MAX_NAME_LENGTH} characters")
    if len(text) > MAX_NAME_LENGTH:
        raise InvalidSagaDataError(
            field, f"must have at most {MAX_NAME_LENGTH} characters, not {len(text)}: {show(text)}"
        )
    return text


def valid_text(field: str, text: object) -> str:
    if not isinstance(text, str):
        raise InvalidSagaDataError(field, f"must be a str, not {show(text)}; {text_remedy(text)}")
    if "\0" in text:
        raise InvalidSagaDataError(
            field, f"must not contain NUL (at index {text.index(chr(0))}), which PostgreSQL can't store; remove it"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidSagaDataError(
                field, f"must not contain a lone surrogate (at index {exc.start}), which UTF-8 can't hold; replace it"
            ) from exc
    # A plain str: drivers write a str enum by its name.
    return str.__str__(text)


def valid_status(status: object) -> SagaStatus:
    return _member(SagaStatus, status)


def valid_end(status: object) -> SagaStepStatus:
    end = _member(SagaStepStatus, status)
    if end is SagaStepStatus.STARTED:
        raise InvalidSagaDataError(
            "status", "must say how the step ended: COMPLETED, FAILED or COMPENSATED, not STARTED"
        )
    return end


def valid_step(step: object) -> LogStep:
    if not isinstance(step, LogStep):
        raise InvalidSagaDataError("steps", f"must hold LogStep objects, not {show(step)}; make LogStep(...) of it")
    name, action = valid_name("step_name", step.step_name), valid_action(step.action)
    status = _member(SagaStepStatus, step.status)
    details = None if step.details is None else valid_text("details", step.details)
    if name is step.step_name and action is step.action and status is step.status and details is step.details:
        return step
    return LogStep(name, action, status, details)


def valid_version(expected_version: object) -> int | None:
    if expected_version is None:
        return None
    return _valid_int("expected_version", expected_version, -_MAX_INT8, _MAX_INT8)


def valid_entry_id(entry_id: object) -> int:
    return _valid_int("entry_id", entry_id, -_MAX_INT8, _MAX_INT8)


def valid_last_seen(after: object) -> int:
    return _valid_int("after", after, 0, _MAX_INT8)


def valid_person(by: object, reason: object) -> tuple[str, str]:
    """Return who intervenes, and why."""
    by, reason = valid_name("by", by), valid_text("reason", reason)
    if not reason:
        raise InvalidSagaDataError("reason", "must not be empty; whoever reads the history will ask")
    return by, reason


def valid_big_count(field: str, count: object) -> int:
    return _valid_int(field, count, 0, _MAX_INT8)


def valid_count(field: str, count: object, *, least: int = 0) -> int:
    return _valid_int(field, count, least, MAX_INT4)


def valid_max_context_bytes(limit: object) -> int:
    return _valid_int("max_context_bytes", limit, len("{}"), _MOST_CONTEXT_BYTES)


def valid_schema(schema: object) -> str:
    """Return the name of a schema, as PostgreSQL takes it, without quotes."""
    name = valid_text("schema", schema)
    size = len(name.encode())
    if not 1 <= size <= MAX_IDENTIFIER_BYTES:
        raise InvalidSagaDataError(
            "schema",
            f"must have 1 to {MAX_IDENTIFIER_BYTES} bytes, as PostgreSQL's names have, not {size}: {show(name)}",
        )
    return name


def valid_duration(field: str, duration: object) -> timedelta:
    if not isinstance(duration, timedelta) or duration < timedelta():
        raise InvalidSagaDataError(
            field,
            f"must be a datetime.timedelta that isn't negative, not {show(duration)}; {duration_remedy(duration)}",
        )
    return duration


def valid_period(field: str, period: object) -> timedelta:
    """Return a duration of at most a century: no saga is older, and no clock overflows."""
    return min(valid_duration(field, period), _A_CENTURY)


def encode_context(context: object) -> str:
    """Return the context as JSON text in ASCII, which every storage keeps to the letter."""
    if type(context) is dict:
        try:
            if is_plain(context) and _ESCAPED_SURROGATE not in (text := _ENCODER.encode(context)):
                return text
        except (TypeError, ValueError, RecursionError):
            pass  # it is named below, by its path
    _check_context(context)
    try:
        return _ENCODER.encode(context)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidSagaDataError("context", f"can't be written as JSON: {exc}") from exc


def is_plain(container: Any, depth: int = MAX_CONTEXT_DEPTH) -> bool:  # noqa: ANN401 - a context holds anything
    """Whether a dict or list holds nothing but JSON's own types; what isn't plain may still be valid."""
    if depth == 0:
        return False
    if type(container) is dict:
        for key in container:
            if type(key) is not str:
                return False
        container = container.values()
    for value in container:
        kind = type(value)
        if kind not in _SCALARS and not ((kind is dict or kind is list) and is_plain(value, depth - 1)):
            return False
    return True


def check_size(context: str, max_bytes: int) -> None:
    """Refuse an encoded context, of which a character is a byte, if it is too big."""
    if len(context) > max_bytes:
        raise InvalidSagaDataError(
            "context",
            f"takes {len(context):,} bytes as JSON, and at most {max_bytes:,} may be stored; keep what is big "
            "elsewhere and a reference to it in the context, or give the storage a greater max_context_bytes",
        )


def decode_context(text: str) -> Context:
    context: Context = json.loads(text)
    return context


# A container still to be checked: itself, its key in its parent, its parent.
_Node = tuple[Any, object, "_Node | None"]


def _check_context(context: object) -> None:
    """Refuse what wouldn't come back equal, naming the path to it."""
    if not isinstance(context, dict):
        raise InvalidSagaDataError("context", f"must be a dict, not {show(context)}; {remedy_for_context(context)}")
    pending: list[tuple[_Node, int]] = [((context, None, None), 1)]
    while pending:
        node, depth = pending.pop()
        if depth > MAX_CONTEXT_DEPTH:
            raise InvalidSagaDataError(
                _path(node), f"is nested more than {MAX_CONTEXT_DEPTH} levels deep, or contains itself; flatten it"
            )
        for key, value in _children(node):
            if value is None or (type(value) is str and value.isascii()):
                continue  # most of what is stored
            if isinstance(value, dict | list):
                pending.append(((value, key, node), depth + 1))
            elif problem := _scalar_problem(value):
                raise InvalidSagaDataError(_path((value, key, node)), problem)


def _children(node: _Node) -> Iterable[tuple[object, object]]:
    container = node[0]
    if not isinstance(container, dict):
        return enumerate(container)
    for key in container:
        if not isinstance(key, str):
            raise InvalidSagaDataError(
                _path(node), f"has the key {show(key)}; JSON's keys are strings: {key_remedy(key)}"
            )
        if problem := _text_problem(key):
            raise InvalidSagaDataError(_path(node), f"has a key that {problem}")
    return container.items()


def _scalar_problem(value: object) -> str | None:
    if isinstance(value, str):
        return _text_problem(value)
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, int):
        if -_FIRST_UNREADABLE_INT < value < _FIRST_UNREADABLE_INT:
            return None
        return "has more than 4300 digits, which Python doesn't read back; store it as a string in hexadecimal"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"is {value}, which JSON can't hold; use None or a string"
    return f"is {show(value)}, which wouldn't come back from JSON as it is; {remedy(value)}"


def _text_problem(text: str) -> str | None:
    if text.isascii() or not (pair := _SURROGATE_PAIR.search(text)):
        return None
    return f"has two surrogates in a row (at index {pair.start()}), which would come back as one character; join them"


def _path(node: _Node) -> str:
    keys = []
    at: _Node | None = node
    while at is not None and at[2] is not None:
        keys.append(f"[{_show_key(at[1])}]")
        at = at[2]
    if len(keys) > _MOST_KEYS_SHOWN:
        keys[2 : 2 - _MOST_KEYS_SHOWN] = ["[...]"]
    return "context" + "".join(reversed(keys))


def _show_key(key: object) -> str:
    return reprlib.repr(str.__str__(key) if isinstance(key, str) else key)


def _member(kind: type[_Status], value: object) -> _Status:
    return valid_member("status", kind, value)


def valid_member(field: str, kind: type[_Status], value: object) -> _Status:
    if isinstance(value, kind):
        return value
    for member in kind:
        if isinstance(value, str) and value == member:
            return member
    raise InvalidSagaDataError(field, f"must be one of {', '.join(kind)}, not {show(value)}; use {kind.__name__}")


def valid_action(action: object) -> StepAction:
    if isinstance(action, str) and action in _ACTIONS:
        return cast("StepAction", str.__str__(action))
    raise InvalidSagaDataError("action", f"must be 'act' or 'compensate', not {show(action)}")


def _valid_int(field: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidSagaDataError(field, f"must be an int, not {show(value)}; convert it with int()")
    if not least <= value <= most:
        raise InvalidSagaDataError(field, f"must be between {least} and {most}, not {value}")
    return int(value)
