"""What is drawn: arguments that make sense, though not always together."""

from datetime import timedelta
from typing import Any, Final, TypeAlias

from hypothesis import strategies as st

from saga_store.model import LogStep, SagaStatus, SagaStepStatus
from saga_store.testing.context import contexts as any_contexts

PRESENT: Final = 3
"""How many sagas there are when a schedule begins."""

SAGAS: Final = 5
"""How many sagas a schedule is about; the others may be created."""

# Any, because text may stand for a status.
Drawn: TypeAlias = st.SearchStrategy[Any]

_HOUR = timedelta(hours=1)
_LARGEST = 2**31 - 1


def _mostly(common: Drawn, rare: Drawn) -> Drawn:
    return st.integers(0, 9).flatmap(lambda number: rare if number == 9 else common)


actors: Drawn = st.integers(0, 1)
sagas: Drawn = st.sampled_from([*range(PRESENT), *range(SAGAS)])
new_sagas: Drawn = st.sampled_from([*range(SAGAS), *range(PRESENT, SAGAS)])

# Each schedule makes names of its own of these.
OWN_NAMES: Final[tuple[str, ...]] = ("order", "refund", "long")
names: Drawn = st.sampled_from(["order", *OWN_NAMES])
filters: Drawn = st.none() | names

contexts: Drawn = _mostly(
    st.sampled_from([{}, {"total": 12}, {"b": 1, "a": [1.0, -0.0, 1e16]}, {"text": "\0\ud800"}, {"n": True}]),
    any_contexts,
)
statuses: Drawn = st.sampled_from([*SagaStatus, "RUNNING"])

# How far the expected version is from the true one: mostly right, sometimes one that was.
fences: Drawn = st.sampled_from([None, None, 0, 0, 0, -1, -2, 1, 2**31, 2**62, -(2**62)])
# In a run that is young.
low_versions: Drawn = st.sampled_from([None, None, None, 1, 2, 3])

step_names: Drawn = st.sampled_from(["reserve", "pay", "Pay", "é\N{GRINNING FACE}", "x" * 255])
actions: Drawn = st.sampled_from(["act", "act", "compensate"])
step_statuses: Drawn = st.sampled_from([*SagaStepStatus, "STARTED"])
details: Drawn = st.sampled_from([None, "", "declined", "'\"\\ %s :x $1\n\N{GRINNING FACE}"])
_steps = st.lists(st.builds(LogStep, step_names, actions, step_statuses, details), max_size=4)

# What a checkpoint says besides its saga, its name and the version that it expects; it may be nothing at all.
changes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "status": statuses,
        "context": contexts,
        "steps": _steps,
        "recovery_attempts": st.sampled_from([0, 1, 2, 5, _LARGEST]),
    },
)

durations: Drawn = st.sampled_from([*[timedelta(0)] * 5, _HOUR, 3 * _HOUR, timedelta.max])
leases: Drawn = st.sampled_from([_HOUR, _HOUR, 3 * _HOUR, timedelta(0), timedelta.max])
hours: Drawn = st.sampled_from([number * _HOUR for number in (1, 2, 3, 24)])
owners: Drawn = st.sampled_from(["worker-1", "worker-2", "Zoë"])
limits: Drawn = st.sampled_from([100, 100, 1, 2, 0])
max_attempts: Drawn = st.sampled_from([5, 5, 5, _LARGEST, 1, 2, 0])
people: Drawn = st.sampled_from(["alice", "Zoë"])
reasons: Drawn = st.sampled_from(["it hangs", 'ticket "7" \N{EM DASH} \N{GRINNING FACE}'])
