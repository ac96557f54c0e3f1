"""What is drawn: arguments, good and bad, for every call of the contract."""

from collections import Counter
from datetime import timedelta
from typing import Any

from hypothesis import strategies as st

from saga_store.model import LogStep, SagaStatus, SagaStepStatus
from saga_store.testing.context import contexts as any_contexts
from saga_store.testing.input import BAD_INPUTS, BadInput

SAGAS = 5
"""How many sagas a schedule is about; at its beginning there are none of them."""

_HOUR = timedelta(hours=1)

actors = st.integers(0, 1)
sagas = st.integers(0, SAGAS - 1)

_bad_names = st.sampled_from(["", "x" * 256, "a\0b", "a\ud800", None, 7, b"order"])
# Each schedule makes names of its own of these.
OWN_NAMES = ("order", "refund", "long")
names: st.SearchStrategy[Any] = st.sampled_from([*OWN_NAMES[:2], *OWN_NAMES])
any_names: st.SearchStrategy[Any] = names | names | names | _bad_names

_plain_contexts = st.sampled_from([{}, {"total": 12}, {"b": 1, "a": [1.0, -0.0, 1e16]}, {"text": "\0\ud800"}])
_bad_contexts: st.SearchStrategy[Any] = st.sampled_from([None, [], {1: 1}, {"a": float("nan")}, {"a": (1,)}, {"a": {1}}])
contexts: st.SearchStrategy[Any] = _plain_contexts | _plain_contexts | any_contexts | _bad_contexts

_statuses = st.sampled_from(SagaStatus)
statuses: st.SearchStrategy[Any] = (
    _statuses | _statuses | st.sampled_from(["RUNNING", "DONE", "running", "", None, 1, SagaStepStatus.STARTED])
)

# From the true version: mostly right, or one that was.
fences = st.sampled_from([None, None, 0, 0, 0, -1, -2, 1, 2**31, 2**62, -(2**62)])

step_names: st.SearchStrategy[Any] = st.sampled_from(["reserve", "pay", "Pay", "é", "x" * 255]) | _bad_names
actions: st.SearchStrategy[Any] = st.sampled_from(["act", "act", "act", "compensate", "undo"])
step_statuses: st.SearchStrategy[Any] = st.sampled_from([*SagaStepStatus, *SagaStepStatus, "STARTED", "DONE", None])
details: st.SearchStrategy[Any] = st.sampled_from([None, None, "", "declined", "'\"\\ %s :x $1\n\N{GRINNING FACE}", "\0"])

_step = st.builds(
    LogStep,
    st.sampled_from(["reserve", "pay"]),
    st.sampled_from(["act", "compensate"]),
    st.sampled_from(SagaStepStatus),
    st.sampled_from([None, "", "declined"]),
)
_any_step = st.builds(LogStep, step_names, actions, step_statuses, details)
_steps = st.lists(_step | _step | _step | _any_step, max_size=4)
attempts = st.sampled_from([None, None, None, 0, 1, 2, 5, 2**31 - 1, -1, 2**31])

changes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {}, optional={"status": statuses, "context": contexts, "steps": _steps, "recovery_attempts": attempts}
)
"""What a checkpoint says besides its saga, its name and the version that it expects."""

durations: st.SearchStrategy[Any] = st.sampled_from(
    [timedelta(0), timedelta(0), timedelta(0), _HOUR, _HOUR, 3 * _HOUR, timedelta.max, -_HOUR, 300]
)
leases: st.SearchStrategy[Any] = st.sampled_from([_HOUR, _HOUR, 3 * _HOUR, timedelta(0), timedelta.max, -_HOUR, None])
hours = st.sampled_from([1, 1, 2, 3, 24]).map(lambda number: number * _HOUR)

owners: st.SearchStrategy[Any] = st.sampled_from(["worker-1", "worker-1", "worker-2", "worker-2", "", None, "\0"])
limits: st.SearchStrategy[Any] = st.sampled_from([100, 100, 1, 2, 0, -1, 1.0])
max_attempts: st.SearchStrategy[Any] = st.sampled_from([5, 5, 2**31 - 1, 1, 2, 0, -1, True])

people: st.SearchStrategy[Any] = st.sampled_from(["alice", "alice", "Zoë", "", None])
reasons: st.SearchStrategy[Any] = st.sampled_from(["it hangs", "it hangs", 'ticket "7" \N{EM DASH}', "", "\0", 7])


def enough_for(name: object, limit: Any) -> Any:  # noqa: ANN401 - bad ones may be anything
    """Return a limit that, without a name, other schedules' sagas can't use up."""
    return 2**31 - 1 if name is None and type(limit) is int and limit >= 0 else limit


def _named() -> dict[str, BadInput]:
    """Give each bad input a name of its own, for a schedule that is printed says what it did by names alone."""
    counter: Counter[str] = Counter()
    named = {}
    for bad in BAD_INPUTS:
        counter[str(bad)] += 1
        number = counter[str(bad)]
        named[f"{bad} ({number})" if number > 1 else str(bad)] = bad
    return named


BAD_INPUTS_BY_NAME = _named()
bad_inputs = st.sampled_from(list(BAD_INPUTS_BY_NAME))
