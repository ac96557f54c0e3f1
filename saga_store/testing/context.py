"""Subject: contexts come back exactly as they went in, and nobody holds a live piece of one."""

import re
from typing import Any
from uuid import uuid4

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from saga_store.interface import ISagaStorage
from saga_store.model import Context
from saga_store.testing.contract import Contract, Unit, new_saga

_moderate = settings(
    max_examples=25,
    deadline=None,
    # Each example makes sagas of its own, so it matters neither that the fixtures are shared nor which class runs it.
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
        HealthCheck.too_slow,
    ],
)

# JSON reads a high surrogate before a low one as the character that they encode: such a text doesn't come back equal.
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

_texts = st.text(st.characters(exclude_categories=())).filter(lambda text: not _PAIR.search(text))
_numbers = (
    st.integers() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
)
_values = st.recursive(
    st.none() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(_texts, inner, max_size=6),
    max_leaves=25,
)
contexts: st.SearchStrategy[Context] = st.dictionaries(_texts, _values, max_size=6)
"""Whatever a context may be."""


def nested(depth: int) -> Context:
    """Return a context of dicts and lists by turns, so many levels deep."""
    value: Any = None
    for level in range(depth, 0, -1):
        value = {"inner": value} if level % 2 else [value]
    context: Context = value
    return context


class FidelityContract(Contract):
    """What goes in comes out, to the last bit: types, signs, order of keys and all."""

    @_moderate
    @given(_numbers)
    @example(0)
    @example(-0.0)
    @example(0.0)
    @example(1.0)
    @example(1e16)
    @example(1e22)
    @example(5e-324)
    @example(-2.2250738585072014e-308)
    @example(1.7976931348623157e308)
    @example(0.1 + 0.2)
    @example(2**53 + 1)
    @example(2**63)
    @example(-(2**64) - 1)
    @example(10**400)
    @example(-(10**4299))
    @example(True)  # noqa: FBT003 - an example of a context's value
    @example(False)  # noqa: FBT003 - an example of a context's value
    async def test_numbers_round_trip(self, storage: ISagaStorage, number: float) -> None:
        """A number keeps its value, its type and its sign: 1e16 stays a float, -0.0 negative, True a bool."""
        await self._round_trips(storage, {"list": [number], "number": number})

    @_moderate
    @given(_texts)
    @example("")
    @example("\0")
    @example("a\0b")
    @example("\\u0000")
    @example("\ud800")
    @example("\udfff\ud800")
    @example("\N{GRINNING FACE}")
    @example("é, e\N{COMBINING ACUTE ACCENT}")
    @example("\N{LINE SEPARATOR}\x7f\x85\ufeff\uffff")
    @example("'\"\\/%s :name $1 {}\r\n\t")
    @example("null")
    async def test_texts_round_trip(self, storage: ISagaStorage, text: str) -> None:
        """A text comes back to the letter, with NUL, lone surrogates and all, and isn't normalised."""
        await self._round_trips(storage, {"list": [text], "text": text})

    @_moderate
    @given(st.lists(_texts, max_size=30, unique=True))
    @example(["b", "a", "aa", "B", "", "10", "9"])
    @example(["\0", "\ud800", "\\u0000", "\N{GRINNING FACE}", "é", "e\N{COMBINING ACUTE ACCENT}"])
    @example([f"key-{n * 7 % 3000}" for n in range(3000)])
    @example(["k" * 100_000])
    async def test_keys_round_trip(self, storage: ISagaStorage, keys: list[str]) -> None:
        """Keys come back to the letter and in their order, however many."""
        await self._round_trips(storage, {key: n for n, key in enumerate(keys)})

    @_moderate
    @given(contexts)
    @example({})
    @example({"dict": {}, "list": [], "none": None, "text": ""})
    @example({"list": [[], {}, [[]], [{}], {"list": []}]})
    @example({"b": ["a\0b", "\ud800", -0.0, 1e16, 5e-324], "a": 2**70})
    @example({"mixed": [1, 1.0, True, "1", None, [1], {"1": 1}]})
    @example(nested(250))
    @example({"long": list(range(10_000))})
    @example({"large": "\N{GRINNING FACE}" * 100_000})
    async def test_contexts_round_trip(self, storage: ISagaStorage, context: Context) -> None:
        """A context comes back as it went in, however it is built of what JSON can hold."""
        await self._round_trips(storage, context)

    async def _round_trips(self, storage: ISagaStorage, context: Context) -> None:
        """Store the context by creation and by update, and compare.

        The text that ``repr`` gives tells 1 from 1.0 and True, 0.0 from -0.0, one order of keys from another
        and a lone surrogate from what stands in for it, all of which ``==`` or JSON may hold to be equal.
        """
        created, updated = uuid4(), uuid4()
        await storage.create_saga(created, "order", context)
        await storage.create_saga(updated, "order", {"other": 1})
        await storage.update_context(updated, context)
        for saga_id in (created, updated):
            _, loaded = await storage.load_saga_state(saga_id)
            assert repr(loaded) == repr(context)


class CopyContract(Contract):
    """Contexts are copied in and out."""

    async def test_created_context_is_copied_in(self, storage: ISagaStorage) -> None:
        """What the caller does to a context after creating a saga with it changes nothing stored."""
        context: Context = {"items": [{"sku": 1}]}
        saga_id = await new_saga(storage, context)
        context["items"][0]["sku"] = 2
        context["total"] = 12
        assert (await storage.load_saga_state(saga_id))[1] == {"items": [{"sku": 1}]}

    async def test_updated_context_is_copied_in(self, storage: ISagaStorage) -> None:
        """What the caller does to a context after an update with it changes nothing stored."""
        saga_id = await new_saga(storage)
        context: Context = {"items": [{"sku": 1}]}
        await storage.update_context(saga_id, context)
        context["items"][0]["sku"] = 2
        context["total"] = 12
        assert (await storage.load_saga_state(saga_id))[1] == {"items": [{"sku": 1}]}

    async def test_context_is_copied_out(self, storage: ISagaStorage) -> None:
        """What the caller does to a context that was loaded changes nothing stored."""
        saga_id = await new_saga(storage, {"items": [{"sku": 1}]})
        _, context = await storage.load_saga_state(saga_id)
        context["items"][0]["sku"] = 2
        context["total"] = 12
        assert (await storage.load_saga_state(saga_id))[1] == {"items": [{"sku": 1}]}

    async def test_context_is_copied_within_a_unit(self, unit: Unit) -> None:
        """Nor does a unit of work share a context with its caller before it is committed."""
        context: Context = {"items": [{"sku": 1}]}
        async with unit() as storage:
            saga_id = await new_saga(storage, context)
            context["items"][0]["sku"] = 2
            _, loaded = await storage.load_saga_state(saga_id)
            loaded["items"][0]["sku"] = 3
            assert (await storage.load_saga_state(saga_id))[1] == {"items": [{"sku": 1}]}
        async with unit() as storage:
            assert (await storage.load_saga_state(saga_id))[1] == {"items": [{"sku": 1}]}

    async def test_callers_context_is_left_alone(self, storage: ISagaStorage) -> None:
        """The storage changes nothing in the caller's own context."""
        context: Context = {"b": [1, {"c": None}], "a": -0.0}
        before = repr(context)
        saga_id = await new_saga(storage, context)
        await storage.update_context(saga_id, context)
        assert repr(context) == before

    async def test_sagas_share_no_context(self, storage: ISagaStorage) -> None:
        """Two sagas made from one dict go separate ways."""
        context: Context = {"items": [1]}
        first, second = await new_saga(storage, context), await new_saga(storage, context)
        await storage.update_context(first, {"items": [2]})
        assert (await storage.load_saga_state(second))[1] == {"items": [1]}
