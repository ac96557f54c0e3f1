"""Figures and pages over shards: added up or told apart, and what is said of a shard that is down."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import httpx
import pytest

from saga_store import Checkpoint, LogStep, MemoryDatabase, MemorySagaStorage, SagaStatus, SagaStepStatus
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.errors import StorageUnavailableError
from saga_store.shard_records import ShardState
from saga_store.sharding import ShardedSagaStorage
from saga_store.telemetry.prometheus import SagaCollector, exposition, samples
from saga_store.testing.retention import RetentiveStorage, verified
from saga_store.web import create_app
from tests.html_pages import Html
from tests.shard_schemas import ALL, SECRET, Shards, ids_of
from tests.test_web_command import ANY_PORT, serving

STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)
DOWN = 1
IDS = {shard: ids_of(shard, 2) for shard in range(3)}


class Away(MemorySagaStorage):
    """A shard that can be taken away."""

    is_away = False

    async def _fetch_shard_state(self) -> ShardState:
        if self.is_away:
            raise StorageUnavailableError("the server is down", "57P03")
        return await super()._fetch_shard_state()


async def fill(storage: ShardedSagaStorage) -> None:
    for ids in IDS.values():
        for saga_id in ids:
            await storage.save(
                Checkpoint(saga_id, name="order", context={}, status=SagaStatus.RUNNING, steps=[STARTED])
            )
            await storage.reset_recovery_attempts(saga_id, by="alice", reason="why not")


@pytest.fixture
async def parts() -> list[Away]:
    parts = [Away(MemoryDatabase()) for _ in range(3)]
    await fill(ShardedSagaStorage(parts))
    return parts


@pytest.fixture
def without(parts: list[Away]) -> ShardedSagaStorage:
    """Shards of which one is down."""
    parts[DOWN].is_away = True
    return ShardedSagaStorage(parts)


def found(text: str, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of a metric by the values of their labels, in the order of the labels' names."""
    return {
        tuple(value for _, value in sorted(one["labels"].items())): one["value"]
        for one in samples(text)
        if one["name"] == name
    }


class TestFigures:
    async def test_counts_are_added_up(self, parts: list[Away]) -> None:
        """Sagas by name and condition over all shards; what only rises is told by shard."""
        text = exposition(await ShardedSagaStorage(parts).get_figures())
        assert found(text, "saga_store_unfinished") == {("active", "order"): 6}
        assert found(text, "saga_store_in_doubt_steps") == {(): 6}
        assert found(text, "saga_store_shard_up") == {("0",): 1, ("1",): 1, ("2",): 1}
        assert set(found(text, "saga_store_log_entries_total")) == {("0",), ("1",), ("2",)}
        assert set(found(text, "saga_store_archived_total")) == {("0",), ("1",), ("2",)}

    async def test_a_shard_that_isnt_archived_any_more_isnt_hidden(self, parts: list[Away]) -> None:
        archives = {place: await verified(cast("RetentiveStorage", parts[place])) for place in (2, 0)}
        text = exposition(await ShardedSagaStorage(parts).get_figures())
        assert found(text, "saga_store_last_archive_timestamp_seconds") == {
            (str(place),): pytest.approx(archive.archived_at.timestamp())
            for place, archive in archives.items()
            if archive.archived_at is not None
        }

    async def test_without_shards_it_is_as_ever(self, parts: list[Away]) -> None:
        text = exposition(await parts[0].get_figures())
        assert "shard" not in text

    async def test_a_shard_that_is_down_is_told(self, without: ShardedSagaStorage, parts: list[Away]) -> None:
        """Its series are missing, and no other falls: a counter that fell would look like a restart."""
        collector = SagaCollector(without)
        text = await collector.scrape()
        assert found(text, "saga_store_up") == {(): 1}
        assert found(text, "saga_store_shard_up") == {("0",): 1, ("1",): 0, ("2",): 1}
        assert found(text, "saga_store_unfinished") == {("active", "order"): 4}
        before = found(text, "saga_store_log_entries_total")
        parts[DOWN].is_away = False
        await collector.refresh()
        after = found(collector.text(), "saga_store_log_entries_total")
        assert after == before | {("1",): after["1",]}

    async def test_no_shard_answers(self, without: ShardedSagaStorage, parts: list[Away]) -> None:
        for part in parts:
            part.is_away = True
        text = await SagaCollector(without).scrape()
        assert [one["name"] for one in samples(text)] == ["saga_store_up"]
        assert found(text, "saga_store_up") == {(): 0}

    def test_the_verb(
        self, shards: Shards, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One exposition of all, with each shard's tables; what is missing is said on stderr and by the exit code."""
        monkeypatch.setenv("DATABASE_URL", shards.database.url())
        shards.do(fill)
        assert main(["metrics", *ALL]) == Exit.DONE
        text = capsys.readouterr().out
        assert found(text, "saga_store_unfinished") == {("active", "order"): 6}
        assert {shard for _, shard, _ in found(text, "saga_store_table_bytes")} == {"0", "1", "2"}
        assert {shard for shard, _ in found(text, "saga_store_dead_tuples")} == {"0", "1", "2"}
        path = shards.folder / "saga.prom"
        assert main(["metrics", *shards.without(DOWN), "--output", str(path)]) == Exit.PARTLY
        err = capsys.readouterr().err
        assert err.startswith("saga-store: shard 1 can't be reached: ")
        assert (err.count("\n"), SECRET in err) == (1, False)
        assert found(path.read_text(), "saga_store_shard_up") == {("0",): 1, ("1",): 0, ("2",): 1}
        assert main(["metrics", *shards.without(DOWN), "--json"]) == Exit.PARTLY
        assert json.loads(capsys.readouterr().out)["missing"] == [DOWN]
        assert main(["metrics", *shards.without(0, 1, 2)]) == Exit.FAILED
        shown = capsys.readouterr()
        assert found(shown.out, "saga_store_up") == {(): 0}
        assert "none of 3 shards can be reached" in shown.err


@asynccontextmanager
async def client_of(storage: ShardedSagaStorage) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(storage, command_options={"--shards": "3"})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://ops.test") as client:
        yield client


async def page(storage: ShardedSagaStorage, path: str, *, status: int = 200) -> Html:
    async with client_of(storage) as client:
        response = await client.get(path)
    html = Html(response.text)
    assert response.status_code == status, html.words
    html.check()
    return html


class TestPages:
    async def test_lists_follow_each_other(self, parts: list[Away]) -> None:
        """From page to page each saga, and each intervention, comes once."""
        async with client_of(ShardedSagaStorage(parts)) as client:
            for first in ("/sagas?limit=1", "/interventions?limit=1"):
                seen: list[str] = []
                path = first
                while path:
                    html = Html((await client.get(path)).text)
                    assert "can't be reached" not in html.words
                    seen += [link for link in html.links if link.startswith("./sagas/")]
                    path = next(("/" + link.removeprefix("./") for link in html.links if "after=" in link), "")
                assert sorted(seen) == sorted(f"./sagas/{saga_id}" for ids in IDS.values() for saga_id in ids)

    async def test_commands_name_the_shards(self, parts: list[Away]) -> None:
        html = await page(ShardedSagaStorage(parts), f"/sagas/{IDS[DOWN][0]}")
        assert "--shards 3" in html.words

    @pytest.mark.parametrize("path", ["/", "/?stale_after=0s", "/sagas", "/interventions"])
    async def test_what_is_missing_is_shown(self, without: ShardedSagaStorage, path: str) -> None:
        html = await page(without, path)
        assert "Without shard 1, which can't be reached now." in html.words
        assert "so many that not all were looked at" not in html.words

    async def test_nothing_that_can_be_seen_needs_attention(self, without: ShardedSagaStorage) -> None:
        """That isn't the same as nothing."""
        assert "No saga that can be seen needs attention" in (await page(without, "/")).words
        assert "At least 4 sagas need attention" in (await page(without, "/?stale_after=0s")).words

    async def test_one_saga(self, without: ShardedSagaStorage) -> None:
        """Of a shard that answers it is shown; of one that doesn't it is 503 and a sentence."""
        html = await page(without, f"/sagas/{IDS[0][0]}")
        assert "can't be reached" not in html.words
        for path in (f"/sagas/{IDS[DOWN][0]}", f"/sagas?id={IDS[DOWN][0]}", f"/sagas?id={IDS[DOWN][0].hex}"):
            html = await page(without, path, status=503)
            assert "Shard 1, where this saga is, can't be asked now; the log says why." in html.words
            assert "57P03" not in html.words

    async def test_one_saga_by_its_first_digits(self, without: ShardedSagaStorage) -> None:
        """Another may begin by them where nobody can look, and so may the one that isn't found."""
        html = await page(without, f"/sagas/{IDS[0][0].hex[:8]}")
        assert "Without shard 1, which can't be reached now." in html.words
        html = await page(without, f"/sagas/{IDS[DOWN][0].hex[:8]}", status=503)
        assert f"No saga that can be seen has an id that begins by {IDS[DOWN][0].hex[:8]}; shard 1 can't" in html.words

    def test_the_verb(self, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
        """It begins with the shards that answer, says which don't, and refuses those that aren't the shards."""
        shards.do(fill)
        url = shards.database.url("psycopg")
        with serving(url, *ANY_PORT, *shards.without(DOWN), "--metrics") as (address, process):
            assert "Without shard 1" in Html(httpx.get(address).text).words
            assert "3 shards" in Html(httpx.get(address).text).words
            assert httpx.get(f"{address}sagas/{IDS[DOWN][0]}").status_code == httpx.codes.SERVICE_UNAVAILABLE
            html = Html(httpx.get(f"{address}sagas/{IDS[0][0]}").text)
            assert "--shards" in html.words
            assert 'saga_store_shard_up{shard="1"} 0.0' in httpx.get(f"{address}metrics").text
            process.terminate()
            _, err = process.communicate(timeout=30)
        assert "shard 1 can't be reached" in err
        assert "the pages are without it until it is back" in err
        assert SECRET not in err
        monkeypatch.setenv("DATABASE_URL", url)
        assert main(["web", *ANY_PORT, "--shards", "2"]) == Exit.FAILED
        assert main(["web", *ANY_PORT, *shards.without(0, 1, 2)]) == Exit.FAILED
