"""Links from page to page, which lead there below any prefix, whether the app is told of it or not."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote, urlencode
from uuid import UUID

from saga_store.errors import InvalidSagaDataError
from saga_store.inspection import SagaSummary
from saga_store.web.asked import Pairs

TraceUrl: TypeAlias = str | Callable[[SagaSummary], str | None]
"""Where a saga is traced: a URL with ``{saga_id}`` or ``{name}`` in it, or what makes one of a saga."""
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_WEB = re.compile(r"https?://[^\s\x00-\x1f]+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Links:
    """Links that are relative to the page, ``up`` leading to the first; they keep what decides about conditions."""

    up: str
    kept: Pairs

    @classmethod
    def of(cls, path: str, kept: Pairs = ()) -> "Links":
        """Return the links of the page at this path of the app's own."""
        return cls("../" * (path.count("/") - 1) or "./", kept)

    def attention(self, pairs: Iterable[tuple[str, str]] = ()) -> str:
        return self._to("", pairs)

    def sagas(self, pairs: Iterable[tuple[str, str]] = ()) -> str:
        return self._to("sagas", pairs)

    def saga(self, saga_id: UUID, pairs: Iterable[tuple[str, str]] = ()) -> str:
        return self._to(f"sagas/{saga_id}", pairs)

    def interventions(self, pairs: Iterable[tuple[str, str]] = ()) -> str:
        return self._to("interventions", pairs)

    def style(self, version: str) -> str:
        return f"{self.up}style.css?{urlencode({'v': version})}"

    def _to(self, page: str, pairs: Iterable[tuple[str, str]]) -> str:
        given = list(pairs)
        names = {name for name, _ in given}
        query = urlencode([*given, *(pair for pair in self.kept if pair[0] not in names)])
        return f"{self.up}{page}{'?' if query else ''}{query}"


class Traces:
    """Where sagas are traced, if anywhere."""

    def __init__(self, given: TraceUrl | None) -> None:
        if isinstance(given, str):
            unknown = sorted(set(_PLACEHOLDER.findall(given)) - {"saga_id", "id", "name"})
            if unknown:
                raise InvalidSagaDataError("trace_url", f"may hold {{saga_id}} and {{name}}, not {{{unknown[0]}}}")
            if not _WEB.fullmatch(given):
                raise InvalidSagaDataError("trace_url", f"must begin by https:// or http://, not {given!r:.60}")
        elif given is not None and not callable(given):
            raise InvalidSagaDataError("trace_url", f"must be a URL or a callable, not a {type(given).__name__}")
        self._given = given

    def __call__(self, saga: SagaSummary) -> str | None:
        """Return where this saga is traced; None if nowhere, or if that is no address of the Web."""
        if self._given is None:
            return None
        if isinstance(self._given, str):
            known = {"saga_id": str(saga.id), "id": str(saga.id), "name": quote(saga.name, safe="")}
            return _PLACEHOLDER.sub(lambda found: known[found[1]], self._given)
        url = self._given(saga)
        return url if isinstance(url, str) and _WEB.fullmatch(url) else None
