"""What may be seen of a context, and how much."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

from saga_store.errors import InvalidSagaDataError
from saga_store.model import Context

Redact: TypeAlias = Callable[[Context], Context] | Iterable[str]
"""What is to be hidden: the names of fields, at whatever depth; or what makes of a context that which may be seen."""
HIDDEN = "[hidden]"
_MOST_CHARACTERS = 200_000
_logger = logging.getLogger("saga_store")


class Redaction:
    """Hides what isn't for everybody who may see sagas."""

    def __init__(self, given: Redact | None) -> None:
        self._names: frozenset[str] = frozenset()
        self._function: Callable[[Context], Context] | None = None
        if callable(given):
            self._function = given
        elif given is not None:
            names = [given] if isinstance(given, str) else list(given)
            if not all(isinstance(name, str) for name in names):
                raise InvalidSagaDataError("redact", "must be names of fields, or a callable that gets a context")
            self._names = frozenset(names)

    def may_search(self, field: str, value: object) -> bool:
        """Whether sagas may be looked for by a field: an answer would tell what is hidden."""
        return self._function is None and not (self._names & {field, *_names(value)})

    def __call__(self, context: Context) -> Context | None:
        """Return what may be seen, changing the context that is given; None if that isn't known."""
        if self._function is None:
            self._hide(context)
            return context
        try:
            return self._function(context)
        except Exception:
            _logger.exception("redact= failed, so a context isn't shown")
            return None

    def _hide(self, context: Context) -> None:
        for parent in _objects(context):
            for name in self._names & parent.keys():
                parent[name] = HIDDEN


def as_text(context: object) -> tuple[str, bool]:
    """Return a context as JSON that is easy to read, and whether it was cut."""
    pieces: list[str] = []
    left = _MOST_CHARACTERS
    try:
        # Piece by piece: indented, a deep context is as much longer as it is deep.
        for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(context):
            pieces.append(piece[:left])
            left -= len(piece)
            if left < 0:
                return "".join(pieces), True
    except (TypeError, ValueError, RecursionError):
        return "It can't be shown as JSON.", False
    return "".join(pieces), False


def _objects(value: object) -> Iterator[dict[str, Any]]:
    """Yield all objects in a value, whose fields may be replaced meanwhile; without recursion, however deep it is."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            yield one
            rest.extend(one.values())
        elif isinstance(one, list):
            rest.extend(one)


def _names(value: object) -> set[str]:
    return {name for one in _objects(value) for name in one}
