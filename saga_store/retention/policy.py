"""How long sagas are kept, and the stubs of those that were let go."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from saga_store.errors import InvalidSagaDataError
from saga_store.validation import valid_name, valid_period


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How long finished sagas are kept after their last change, before they may be archived and removed.

    What is unfinished is never let go, nor what is held, whatever the policy says.

    Attributes:
        completed: How long COMPLETED ones are kept; None: for ever.
        failed: How long FAILED ones are kept; None: for ever.
        names: How long sagas of a name are kept, COMPLETED or FAILED, in place of the other two.
        forget_after: How long the stub of an archived saga is kept after that; None: for ever. As long as it is
            there, no saga can be created with its id.

    Raises:
        InvalidSagaDataError: A duration is negative or none at all; a name can't be a saga's.
    """

    completed: timedelta | None = None
    failed: timedelta | None = None
    names: Mapping[str, timedelta | None] = field(default_factory=dict)
    forget_after: timedelta | None = None

    def __post_init__(self) -> None:
        for name in ("completed", "failed", "forget_after"):
            if getattr(self, name) is not None:
                valid_period(name, getattr(self, name))
        if not isinstance(self.names, Mapping):
            raise InvalidSagaDataError("names", f"must map names of sagas to timedeltas, not {self.names!r:.60}")
        for name, kept in self.names.items():
            valid_name("names", name)
            if kept is not None:
                valid_period(f"names[{name!r}]", kept)
        # A copy, which the caller doesn't change.
        object.__setattr__(self, "names", dict(self.names))
