"""The pages on the twin: what they show and refuse, below which paths, and that they are only read."""

import asyncio
import logging
import re
import shlex
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlencode
from uuid import UUID, uuid4

import fastapi
import httpx
import litestar
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saga_store import MemorySagaStorage, SagaArchivedError, SagaNotFoundError, SagaStepStatus, SchemaError
from saga_store.errors import InvalidSagaDataError, StorageUnavailableError
from saga_store.inspection import SagaCondition, SagaPage, SagaQuery, SagaSummary, visible
from saga_store.telling import ATTENTION
from saga_store.web import create_app, render_saga
from saga_store.web.asked import KNOWN
from tests.html_pages import Html, crawl
from tests.many_sagas import HOSTILE, HOSTILE_TEXTS, NOW, ManySagas, make_many_sagas

SECRET = "postgresql://shop:hunter2@db-1/shop"  # noqa: S105 - which no page may tell


@pytest.fixture(scope="module")
def many() -> ManySagas:
    return asyncio.run(make_many_sagas())


@asynccontextmanager
async def client_of(app: ASGIApp, root_path: str = "") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://ops.test") as client:
        yield client


async def page(storage: Any, path: str, *, status: int = 200, **settings: Any) -> Html:  # noqa: ANN401 - of create_app
    """Get a page and check what holds for each."""
    async with client_of(create_app(storage, **settings)) as client:
        response = await client.get(path)
    assert response.status_code == status, Html(response.text).words[-300:]
    html = Html(response.text)
    html.check()
    return html


class TestAttention:
    async def test_reasons_come_first(self, many: ManySagas) -> None:
        """Sagas are grouped by reason, with a verdict on all of them and a hint at a cause."""
        html = await page(many.storage, "/")
        groups = await many.storage.group_sagas(SagaQuery(conditions=ATTENTION), limit=1000)
        stuck = sum(group.count for group in groups)
        assert f"{stuck + 5 + 3} sagas need attention, for {len(groups) + 2} reasons" in html.words
        assert "were never claimed, though silent for more than 10m" in html.words
        assert "Is a recovery worker running?" in html.words
        assert "httpx.ConnectTimeout: https://shipping.internal:#/v#/labels timed out after #s" in html.words

    async def test_each_group_leads_to_its_sagas(self, many: ManySagas) -> None:
        """A group's link lists exactly its sagas, whatever its name, step and error hold."""
        storage = many.storage
        html = await page(storage, "/")
        rows = [link for link in html.links if "condition=" in link and ("name=" in link)]
        groups = await storage.group_sagas(SagaQuery(conditions=ATTENTION), limit=1000)
        assert len(rows) == len(groups) + 2
        counts = []
        for link in rows:
            listed = await page(storage, "/" + link.removeprefix("./"))
            counts.append(len([one for one in listed.links if one.startswith("./sagas/")]))
        assert sorted(counts) == sorted([*(group.count for group in groups), 5, 3])

    async def test_nothing_is_wrong(self) -> None:
        """An empty store says that all is well."""
        html = await page(MemorySagaStorage(), "/")
        assert "No saga needs attention" in html.words

    async def test_judged_otherwise(self, many: ManySagas) -> None:
        """What counts as stale and as exhausted stands in the URL, and stays there from page to page."""
        html = await page(many.storage, "/?stale_after=30d&max_attempts=9")
        assert "0 exhausted" in html.words
        assert all("stale_after=30d&max_attempts=9" in link for link in html.links if link.startswith("./sagas"))


class TestList:
    async def test_pages_follow_each_other(self, many: ManySagas) -> None:
        """From the newest to the oldest every saga comes once."""
        found: list[str] = []
        path = "/sagas?limit=60"
        async with client_of(create_app(many.storage)) as client:
            while path:
                html = Html((await client.get(path)).text)
                found += [link for link in html.links if link.startswith("./sagas/")]
                path = next(("/" + link.removeprefix("./") for link in html.links if "after=" in link), "")
        assert sorted(found) == sorted(f"./sagas/{saga_id}" for saga_id in many.ids)

    @pytest.mark.parametrize(
        ("asked", "query"),
        [
            ("condition=exhausted", SagaQuery(conditions=[SagaCondition.EXHAUSTED])),
            ("condition=held&condition=abandoned", SagaQuery(conditions=[SagaCondition.HELD, SagaCondition.ABANDONED])),
            ("name=invoice&in_doubt=&step=", SagaQuery(name="invoice")),
            ("step=ChargeCard&silent_for=1h", SagaQuery(step="ChargeCard", silent_for=timedelta(hours=1))),
            (
                "in_doubt=1&owner=worker-7f9c.eu-1+pid+60",
                SagaQuery(in_doubt=True, lease_owner="worker-7f9c.eu-1 pid 60"),
            ),
            ("context=order_id%3Do-7", SagaQuery(context={"order_id": "o-7"})),
            ("id=7b244b6e", SagaQuery(id_prefix="7b244b6e")),
            ("max_attempts=0&condition=exhausted", SagaQuery(max_attempts=0, conditions=[SagaCondition.EXHAUSTED])),
        ],
    )
    async def test_filters(self, many: ManySagas, asked: str, query: SagaQuery) -> None:
        """What the URL asks is what the storage is asked."""
        expected = await many.storage.find_sagas(query, limit=200)
        html = await page(many.storage, f"/sagas?limit=200&{asked}")
        found = [link.partition("?")[0] for link in html.links if link.startswith("./sagas/")]
        assert found == [f"./sagas/{saga.id}" for saga in expected.sagas]

    @pytest.mark.parametrize(
        ("asked", "named"),
        [
            ("condition=stuck", "condition must be one of finished, held"),
            ("status=DONE", "status must be one of PENDING"),
            ("silent_for=long", "silent_for 'long' is no duration"),
            ("created_after=yesterday", "created_after 'yesterday' is no time"),
            ("created_after=0001-01-01T00:00%2B14:00", "created_after"),
            ("id=xyz", "id_prefix must be 1 to 32 hexadecimal digits"),
            ("limit=1e9", "limit must be a number from 1 to 200"),
            ("limit=0", "limit must be a number"),
            ("max_attempts=-1", "max_attempts must be a number"),
            ("stale_after=-1s", "stale_after"),
            ("after=nonsense", "after must be what a page gave"),
            ("context=order_id", "context must be written like order_id=o-17"),
            ("in_doubt=yes", "in_doubt must be 1 or left out"),
            ("nme=order", "'nme' isn't known here"),
            ("name=a&name=b", "name is asked more than once"),
            ("name=%00", "name"),
            ("name=" + "x" * 256, "name"),
            ("&".join(["status=FAILED"] * 101), "asks for more than 100 things"),
            ("created_before=999999999d", "created_before '999999999d' is no time"),
        ],
    )
    async def test_a_bad_filter_is_named(self, many: ManySagas, asked: str, named: str) -> None:
        """What can't be asked is 400 and a line that names it."""
        assert named in (await page(many.storage, f"/sagas?{asked}", status=400)).words


class TestSaga:
    async def test_it_is_told(self, many: ManySagas) -> None:
        """Verdict, timeline, history and commands of a saga in doubt."""
        saga_id = many.named["in doubt 0"]
        html = await page(many.storage, f"/sagas/{saga_id}")
        assert "Began compensating TakePayment at 2026-11-25 22:47:45, and nothing says how it ended." in html.words
        assert ("rect", "bar in-doubt") in {(tag, attributes.get("class", "")) for tag, attributes in html.tags}
        assert "nothing for 1h 56m, until now" in html.words
        [entry] = await many.storage.get_in_doubt_steps(saga_id)
        commands = [shlex.split(piece) for piece in html.pieces if piece.startswith("saga-store saga ")]
        assert [words[2:7] for words in commands[:2]] == [
            ["settle", str(saga_id), "--entry", str(entry.id), "--status"] for _ in range(2)
        ]

    async def test_by_the_first_digits(self, many: ManySagas) -> None:
        """Eight digits lead to a saga; those that several have to a list of them."""
        saga_id = many.named["polls"]
        assert str(saga_id) in (await page(many.storage, f"/sagas/{saga_id.hex[:8].upper()}")).words
        storage = MemorySagaStorage()
        twins = [UUID(hex=f"0123456789{number:022}") for number in range(2)]
        for twin in twins:
            await storage.create_saga(twin, "order", {})
        html = await page(storage, "/sagas/01234567-89", status=300)
        assert [link for link in html.links if "sagas/0" in link] == [f"../sagas/{twin}" for twin in reversed(twins)]

    @pytest.mark.parametrize(
        ("path", "status", "said"),
        [
            ("/sagas/00000000-0000-0000-0000-000000000000", 404, "No saga has an id that begins by 00000000-"),
            ("/sagas/deadbeef", 404, "No saga has an id that begins by deadbeef"),
            ("/sagas/dead", 400, "id must have its first 8 digits or more"),
            ("/sagas/" + "0" * 40, 400, "id_prefix must be 1 to 32"),
            ("/sagas/..%2f..%2fetc", 404, "There is no such page"),
            ("/nowhere", 404, "There is no such page"),
            ("/sagas/deadbeef?context=yes", 400, "context must be show or left out"),
            ("/interventions?since=never", 400, "since 'never' is no time"),
        ],
    )
    async def test_what_isnt_there(self, many: ManySagas, path: str, status: int, said: str) -> None:
        """An unknown id or page is told by a page."""
        assert said in (await page(many.storage, path, status=status)).words

    async def test_a_long_history_is_folded(self, many: ManySagas) -> None:
        """The middle of a long history is left out, and shown when it is asked for; the end always is there."""
        path = f"/sagas/{many.named['polls']}"
        html = await page(many.storage, path)
        assert "124 more, 11 of them failed." in html.words
        whole = await page(many.storage, f"{path}?history=all")
        assert sum(tag == "tr" for tag, _ in whole.tags) == sum(tag == "tr" for tag, _ in html.tags) + 123
        assert "PollCarrier \N{MULTIPLICATION SIGN}149" in html.words

    async def test_whatever_it_holds_a_page_is_small(self, many: ManySagas) -> None:
        """5 MB of details, contexts of megabytes and thousands of entries make no big page."""
        async with client_of(create_app(many.storage)) as client:
            for special in ("huge", "big", "5,000 entries", "hostile 1"):
                response = await client.get(f"/sagas/{many.named[special]}?context=show&history=all")
                assert response.status_code == httpx.codes.OK
                assert len(response.content) < 3_000_000
                Html(response.text).check()
        assert (
            "It isn't shown: it is too big"
            in (await page(many.storage, f"/sagas/{many.named['huge']}?context=show")).words
        )
        assert (
            "4000 earlier entries are left out"
            in (await page(many.storage, f"/sagas/{many.named['5,000 entries']}")).words
        )

    async def test_it_is_held(self) -> None:
        """A saga that is kept, whatever a policy says, says so."""
        storage, saga_id = MemorySagaStorage(), uuid4()
        await storage.create_saga(saga_id, "order", {})
        assert "Kept until" not in (await page(storage, f"/sagas/{saga_id}")).words
        await storage.hold_saga(saga_id, by="alice", reason="a lawsuit")
        html = await page(storage, f"/sagas/{saga_id}")
        assert "Kept until released" in html.words
        assert "hold_saga by alice a lawsuit" in html.words

    async def test_contexts_are_shown_on_demand(self, many: ManySagas) -> None:
        """A context isn't read before somebody asks for it."""
        path = f"/sagas/{many.named['in doubt 1']}"
        assert "order_id" not in (await page(many.storage, path)).words
        html = await page(many.storage, f"{path}?context=show")
        assert '"order_id": "o-' in html.words

    async def test_a_file_that_stands_alone(self, many: ManySagas) -> None:
        """A saga's page as one file has its style in itself, and leads nowhere."""
        source = await render_saga(many.storage, many.named["in doubt 0"], redact=["order_id"])
        assert source.count("<style>") == 1
        [policy] = [attributes["content"] for tag, attributes in Html(source).tags if "http-equiv" in attributes]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "href=" not in source
        assert "[hidden]" in source
        with pytest.raises(SagaNotFoundError):
            await render_saga(many.storage, uuid4())


class TestInterventions:
    async def test_they_are_listed(self, many: ManySagas) -> None:
        """Who did what to which saga, and why."""
        async with client_of(create_app(many.storage)) as client:
            html = Html((await client.get("/interventions?since=2026-11-01&by=alice&limit=4")).text)
        assert html.words.count("card network says: never retry (case 4711)") == 4
        older = next(link for link in html.links if "after=" in link)
        more = await page(many.storage, "/" + older.removeprefix("./"))
        assert more.words.count("card network says: never retry (case 4711)") == 4
        assert "paid, says the bank" in (await page(many.storage, "/interventions?since=2026-11-01&by=bob")).words


class TestHostileData:
    @pytest.mark.parametrize("number", range(len(HOSTILE_TEXTS)))
    async def test_text_stays_text(self, many: ManySagas, number: int) -> None:
        """Whatever names, steps, owners, details and contexts hold is text that can be seen, and no element."""
        saga_id = many.named[f"hostile {number}"]
        html = await page(many.storage, f"/sagas/{saga_id}?context=show&history=all")
        text = HOSTILE_TEXTS[number]
        assert (visible(text) if text.strip(" ") else "\N{OPEN BOX}") in html.text
        await page(many.storage, f"/sagas?{httpx.QueryParams({'name': text, 'step': text})}")
        await page(many.storage, "/interventions?since=2026-11-01")

    async def test_what_the_url_says_is_text(self, many: ManySagas) -> None:
        """What somebody puts into a link comes back as text, too."""
        asked = httpx.QueryParams({"name": HOSTILE[:250]})
        html = await page(many.storage, f"/sagas?{asked}")
        assert visible(HOSTILE[:250]) in html.words
        html = await page(many.storage, "/sagas?<script>alert(1)</script>=%22><img src=x>", status=400)
        assert "alert(1)" in html.words
        await page(many.storage, "/%22%3E%3Cscript%3E", status=404)


class TestRedaction:
    async def test_fields_are_hidden_at_any_depth(self) -> None:
        """What is named isn't shown, and nobody can find out what it is by looking for it."""
        storage, saga_id = MemorySagaStorage(), uuid4()
        context = {"card": "4711", "order": [{"card": {"number": "4711"}, "id": 7}]}
        await storage.create_saga(saga_id, "order", context)
        html = await page(storage, f"/sagas/{saga_id}?context=show", redact=["card"])
        assert "4711" not in html.text
        assert html.words.count("[hidden]") == 2
        assert '"id": 7' in html.words
        for asked in ("card=4711", 'order=[{"card": {"number": "4711"}, "id": 7}]'):
            path = f"/sagas?{httpx.QueryParams({'context': asked})}"
            assert "can't be asked for" in (await page(storage, path, redact="card", status=400)).words
        assert (await storage.get_saga(saga_id)).context == context

    async def test_by_a_callable(self, caplog: pytest.LogCaptureFixture) -> None:
        """A callable decides what may be seen; if it fails, nothing is."""
        storage, saga_id = MemorySagaStorage(), uuid4()
        await storage.create_saga(saga_id, "order", {"card": "4711", "id": 7})
        path = f"/sagas/{saga_id}?context=show"
        html = await page(storage, path, redact=lambda context: {"id": context["id"]})
        assert "4711" not in html.text
        assert '"id": 7' in html.words
        with caplog.at_level(logging.CRITICAL, logger="saga_store"):
            html = await page(storage, path, redact=lambda context: {"id": context["nope"]})
        assert "4711" not in html.text
        assert "It isn't shown" in html.words
        asked = httpx.QueryParams({"context": "id=7"})
        assert "can't be asked for" in (await page(storage, f"/sagas?{asked}", redact=dict, status=400)).words


class TestTraces:
    async def test_a_saga_leads_to_its_trace(self, many: ManySagas) -> None:
        """A URL with the id in it, or what a callable says; names are quoted, and what is no address is left out."""
        saga_id = many.named["hostile 0"]
        html = await page(many.storage, f"/sagas/{saga_id}", trace_url="https://trace.test/?id={saga_id}&name={name}")
        [link] = [link for link in html.links if link.startswith("https://")]
        assert httpx.URL(link).params == httpx.QueryParams({"id": str(saga_id), "name": HOSTILE[:250]})

        def refuse(_: SagaSummary) -> str:
            raise ValueError(SECRET)

        for trace in (lambda _: "javascript:alert(1)", lambda _: None, refuse):
            html = await page(many.storage, f"/sagas/{saga_id}", trace_url=trace)
            assert {link[:3] for link in html.links} == {"../", "#ma"}

    @pytest.mark.parametrize("trace_url", ["javascript:alert('{saga_id}')", "https://trace.test/{trace}", 7])
    def test_a_bad_setting_is_refused(self, trace_url: Any) -> None:  # noqa: ANN401 - what it is about
        """What can't be a trace's address is refused before a page is shown."""
        with pytest.raises(InvalidSagaDataError) as refusal:
            create_app(MemorySagaStorage(), trace_url=trace_url)
        assert refusal.value.field == "trace_url"


class TestReading:
    async def test_only_reading_is_answered(self, many: ManySagas) -> None:
        """GET and HEAD are answered, everything else is 405 and says what may be asked."""
        async with client_of(create_app(many.storage)) as client:
            for path in ("/", "/sagas", f"/sagas/{many.named['polls']}", "/interventions", "/style.css"):
                head = await client.head(path)
                assert (head.status_code, head.content) == (httpx.codes.OK, b"")
                for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"):
                    response = await client.request(method, path)
                    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
                    Html(response.text).check()

    async def test_headers(self, many: ManySagas) -> None:
        """No page may run a script, be framed, be kept, or tell others where one came from."""
        async with client_of(create_app(many.storage)) as client:
            for path in ("/", "/sagas", "/nowhere", "/style.css", "/sagas?x=1"):
                headers = (await client.get(path)).headers
                assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self'; ")
                assert headers["x-content-type-options"] == "nosniff"
                assert headers["referrer-policy"] == "no-referrer"
                assert headers["x-frame-options"] == "DENY"
                assert headers["cache-control"] == "no-store" or path == "/style.css"

    async def test_hosts(self, many: ManySagas) -> None:
        """Where hosts are named, a request that names another one is refused, as DNS rebinding would have it."""
        app = create_app(many.storage, allowed_hosts=["localhost", "::1", "Ops.Example"])
        async with client_of(app) as client:
            for host in ("localhost", "localhost:8765", "[::1]:8765", "ops.example", "OPS.EXAMPLE.:80"):
                assert (await client.get("/", headers={"host": host})).status_code == httpx.codes.OK, host
            for host in (
                "evil.test",
                "localhost.evil.test",
                "localhost:x",
                "",
                "a b",
                "127.0.0.1",
                "localhost@evil.test",
            ):
                response = await client.get("/", headers={"host": host})
                assert response.status_code == httpx.codes.BAD_REQUEST, host
                assert "need attention" not in Html(response.text).words

    async def test_metrics_if_asked_for(self, many: ManySagas) -> None:
        """Figures for Prometheus are there if the host wants them, and else not."""
        async with client_of(create_app(many.storage, metrics=True)) as client:
            response = await client.get("/metrics")
        assert 'saga_store_unfinished{condition="exhausted",name="subscription-renewal"} 7.0' in response.text
        await page(many.storage, "/metrics", status=404)


_VALUES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["1", "0", "-1", "10m", "all", "show", "FAILED", "stale", "a=1", "a=[", "2026-11-26", "7b244b6e"]),
)
_PAGES = ["/", "/sagas", "/interventions", "/sagas/7b244b6e", "/sagas/deadbeef", "/metrics", "/sagas/", "/\x00"]


@given(
    path=st.one_of(st.sampled_from(_PAGES), st.text(max_size=20).map("/sagas/{}".format)),
    pairs=st.lists(
        st.tuples(st.sampled_from(sorted({name for names in KNOWN.values() for name in names})), _VALUES), max_size=4
    ),
    junk=st.binary(max_size=8),
)
@settings(deadline=None, max_examples=150)
def test_whatever_is_asked_there_is_an_answer(
    few: MemorySagaStorage, path: str, pairs: list[tuple[str, str]], junk: bytes
) -> None:
    """No URL, however odd, is an error of the server's; what it says comes back as text that can be seen."""
    query = urlencode(pairs, errors="replace").encode() + junk
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": query, "headers": [], "root_path": ""}

    async def ask() -> None:
        await create_app(few)(scope, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] in {200, 300, 303, 307, 400, 404}
    if sent[1]["body"] and (b"content-type", b"text/html; charset=utf-8") in sent[0]["headers"]:
        Html(sent[1]["body"].decode()).check()


class BrokenStorage(MemorySagaStorage):
    """Fails whenever a view is asked for."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def _find(self, *_: object) -> SagaPage:
        raise self.error

    async def _sample(self, *_: object) -> Any:  # noqa: ANN401 - it returns nothing
        raise self.error


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "status", "said"),
        [
            (
                StorageUnavailableError(f"no route to {SECRET}"),
                503,
                "The database can't be asked now; the log says why.",
            ),
            (StorageUnavailableError(f"{SECRET} is starting", "57P03"), 503, "SQLSTATE 57P03"),
            (StorageUnavailableError("the view took longer than it may", "57014"), 503, "longer than it may"),
            (StorageUnavailableError("permission denied: GRANT SELECT ON saga_logs", "42501"), 500, "GRANT SELECT ON"),
            (SchemaError(None, "saga_store_0005"), 500, "run `saga-store upgrade`"),
            (SagaArchivedError(UUID(int=1), "s3://sagas", NOW), 404, "to s3://sagas; `saga-store restore 00000000-"),
            (RuntimeError(SECRET), 500, "This page couldn't be made; the log says why."),
        ],
    )
    async def test_an_error_is_a_page(
        self, error: Exception, status: int, said: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What goes wrong is told in a line, without a traceback or anything that is nobody's business."""
        with caplog.at_level(logging.CRITICAL, logger="saga_store"):
            for path in ("/", "/sagas", "/sagas/deadbeef"):
                html = await page(BrokenStorage(error), path, status=status)
                assert said in html.words
                assert "hunter2" not in html.source
                assert "Traceback" not in html.source

    @pytest.mark.parametrize("redact", [[7], [None]])
    def test_bad_settings_are_refused(self, redact: Any) -> None:  # noqa: ANN401 - what it is about
        """What can't be hidden is refused before anything is shown."""
        with pytest.raises(InvalidSagaDataError) as refusal:
            create_app(MemorySagaStorage(), redact=redact)
        assert refusal.value.field == "redact"
        with pytest.raises(InvalidSagaDataError):
            create_app(MemorySagaStorage(), allowed_hosts=["no host/"])


def stripping(app: ASGIApp, prefix: str, root_path: str = "") -> ASGIApp:
    """Return a proxy that shows an app below a prefix, of which that learns nothing but what ``root_path`` tells."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(prefix)
        # As uvicorn has it, which puts what it was told of before each path.
        await app({**scope, "path": root_path + path, "raw_path": path.encode(), "root_path": root_path}, receive, send)

    return proxy


def keeping(app: ASGIApp, prefix: str) -> ASGIApp:
    """Return a proxy that hands each path on as it is, to a server that was told of the prefix."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "path": prefix + scope["path"], "root_path": prefix}, receive, send)

    return proxy


def in_litestar(app: ASGIApp, path: str) -> ASGIApp:
    @litestar.asgi(path, is_mount=True, copy_scope=True)
    async def pages(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return litestar.Litestar([pages], openapi_config=None)  # type: ignore[return-value] # its scopes are typed more closely


def in_fastapi(app: ASGIApp, path: str) -> ASGIApp:
    host = fastapi.FastAPI()
    host.mount(path, app)
    return host


def in_starlette(app: ASGIApp, path: str) -> ASGIApp:
    return Starlette(routes=[Mount(path, app)])


HOUSES: dict[str, tuple[Callable[[ASGIApp], ASGIApp], str]] = {
    "at the root": (lambda app: app, "/"),
    "told of a prefix that is stripped": (lambda app: stripping(app, "/a/b", "/a/b"), "/a/b/"),
    "not told of a prefix that is stripped": (lambda app: stripping(app, "/a/b"), "/a/b/"),
    "told of a prefix that is kept": (lambda app: keeping(app, "/a/b"), "/a/b/"),
    "Starlette": (lambda app: in_starlette(app, "/a/b"), "/a/b/"),
    "FastAPI": (lambda app: in_fastapi(app, "/a/b"), "/a/b"),
    "FastAPI below a stripped prefix": (lambda app: stripping(in_fastapi(app, "/b"), "/a"), "/a/b/"),
    "FastAPI at a page's own name": (lambda app: in_fastapi(app, "/sagas"), "/sagas/"),
    "Litestar": (lambda app: in_litestar(app, "/a/b"), "/a/b/"),
    "Litestar without the last slash": (lambda app: in_litestar(app, "/a/b"), "/a/b"),
}


@pytest.fixture(scope="module")
def few() -> MemorySagaStorage:
    storage = MemorySagaStorage()
    asyncio.run(make_few(storage))
    return storage


async def make_few(storage: MemorySagaStorage) -> None:
    for name in ("order", "sagas", "a/b?c#d"):
        saga_id = uuid4()
        await storage.create_saga(saga_id, name, {})
        await storage.log_step(saga_id, "pay", "act", SagaStepStatus.STARTED)
        await storage.give_up_saga(saga_id, by="alice", reason="lost")


@pytest.mark.parametrize("house", HOUSES)
async def test_links_lead_on_below_any_prefix(house: str, few: MemorySagaStorage) -> None:
    """Whoever mounts or proxies it, every link of every page answers 200, and none leads out."""
    wrap, start = HOUSES[house]
    async with client_of(wrap(create_app(few))) as client:
        found = await crawl(client, f"http://ops.test{start}?stale_after=0&max_attempts=3", most=60)
    assert len(found) == 60
    assert set(found.values()) == {200}
    assert {httpx.URL(url).path for url in found} >= {
        start.rstrip("/") + page for page in ("/sagas", "/interventions", "/style.css")
    }
    assert all(url.startswith(f"http://ops.test{start.rstrip('/')}") for url in found)


async def test_every_link_of_many_sagas(many: ManySagas) -> None:
    """With sagas of all kinds, and hostile ones, too."""
    async with client_of(create_app(many.storage, metrics=True)) as client:
        found = await crawl(client, "http://ops.test/?stale_after=1s", most=150)
    assert set(found.values()) == {200}
    assert len(found) == 150


def test_all_files_are_declared() -> None:
    """Whatever a page needs is of a kind that goes into the wheel."""
    folder = Path(__file__).parent.parent / "saga_store" / "web"
    rest = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert rest - {"__pycache__"} == {"static", "templates"}


async def test_a_slash_at_the_end_does_no_harm(few: MemorySagaStorage) -> None:
    """A page is found with a slash at its end, too, and its links lead to the same."""
    async with client_of(create_app(few)) as client:
        response = await client.get("/sagas/")
        assert response.status_code == httpx.codes.OK
        assert "../interventions" in Html(response.text).links


@pytest.mark.parametrize("blocks", [1, 2], ids=["FastAPI", "Litestar"])
async def test_the_documentation_mounts_it(
    few: MemorySagaStorage, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """What docs/web.md says to do in a host application works, with the twin in the place of PostgreSQL."""
    document = (Path(__file__).parent.parent / "docs" / "web.md").read_text(encoding="utf-8")
    program = "".join(re.findall(r"```python\n(.*?)```", document, re.DOTALL)[:blocks])
    module = ModuleType("documented")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module)["few"] = few
    exec(re.sub(r"^storage = .*$", "storage = few", program, flags=re.MULTILINE), vars(module))  # noqa: S102 - our own
    async with client_of(module.app) as client:
        found = await crawl(client, "http://ops.test/ops/sagas", most=30)
    assert type(module.app).__name__ == ("FastAPI" if blocks == 1 else "Litestar")
    assert set(found.values()) == {200}
