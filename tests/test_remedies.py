"""What can't be stored is refused with its path and what to do, whichever library it is of."""

import dataclasses
import enum
import subprocess
import sys
import typing
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest

from saga_store import InvalidSagaDataError, MemorySagaStorage


class Model(pydantic.BaseModel):
    n: int = 1


class Struct(msgspec.Struct):
    n: int = 1


@attrs.define
class Attrs:
    n: int = 1


@dataclasses.dataclass
class Data:
    n: int = 1


class Named(typing.NamedTuple):
    n: int = 1


class Colour(enum.Enum):
    RED = "red"


async def awaited() -> dict[str, int]:
    return {}


VALUES: list[tuple[object, str]] = [
    (Model(), '.model_dump(mode="json")'),
    (Struct(), "msgspec.to_builtins()"),
    (Attrs(), "attrs.asdict()"),
    (Data(), "dataclasses.asdict()"),
    (Named(), "._asdict()"),
    (Colour.RED, ".value"),
    (UUID(int=1), "str()"),
    (Decimal(1), "str()"),
    (Fraction(1, 3), "str()"),
    (Path("a"), "str()"),
    (datetime(2026, 1, 1, tzinfo=UTC), ".isoformat()"),
    (date(2026, 1, 1), ".isoformat()"),
    (time(12), ".isoformat()"),
    (timedelta(1), ".total_seconds()"),
    ((1, 2), "use a list"),
    ({1, 2}, "sorted()"),
    (frozenset({1}), "sorted()"),
    (b"abc", "base64.b64encode()"),
    (bytearray(b"abc"), "base64.b64encode()"),
    (1j, "a list of its parts"),
    (MappingProxyType({}), "dict()"),
    (object(), "convert it to str, int, float, bool, None, list or dict"),
]


@pytest.mark.parametrize(("value", "remedy"), VALUES, ids=lambda given: type(given).__name__)
async def test_a_value_is_named_with_its_remedy(value: object, remedy: str) -> None:
    with pytest.raises(InvalidSagaDataError) as refused:
        await MemorySagaStorage().create_saga(uuid4(), "order", {"items": [{"it": value}]})
    assert refused.value.field == "context['items'][0]['it']"
    assert type(value).__name__ in refused.value.reason
    assert remedy in refused.value.reason


@pytest.mark.parametrize(
    ("context", "remedy"),
    [
        (None, "{}"),
        ('{"total": 12}', "json.loads()"),
        ([1], "under a key"),
        (Model(), '.model_dump(mode="json")'),
        (Data(), "dataclasses.asdict()"),
    ],
    ids=["none", "text", "list", "model", "dataclass"],
)
async def test_what_is_no_context_is_named_with_its_remedy(context: typing.Any, remedy: str) -> None:  # noqa: ANN401 - what it shouldn't be
    with pytest.raises(InvalidSagaDataError, match="must be a dict") as refused:
        await MemorySagaStorage().create_saga(uuid4(), "order", context)
    assert remedy in refused.value.reason


async def test_a_missing_await_is_named() -> None:
    coroutine = awaited()
    for context in ({"it": coroutine}, coroutine):
        with pytest.raises(InvalidSagaDataError, match="await it"):
            await MemorySagaStorage().create_saga(uuid4(), "order", typing.cast("typing.Any", context))
    coroutine.close()


@pytest.mark.parametrize(("key", "remedy"), [(Colour.RED, ".value"), (1, "str()"), (UUID(int=1), "str()")], ids=str)
async def test_a_key_is_named_with_its_remedy(key: object, remedy: str) -> None:
    with pytest.raises(InvalidSagaDataError, match="keys are strings") as refused:
        await MemorySagaStorage().create_saga(uuid4(), "order", typing.cast("typing.Any", {key: 1}))
    assert remedy in refused.value.reason


def test_no_library_is_loaded_for_it() -> None:
    program = "import sys, saga_store; sys.exit(bool({'pydantic', 'attrs', 'attr', 'msgspec'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
