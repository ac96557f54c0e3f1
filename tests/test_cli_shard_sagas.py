"""The verbs of ``saga`` over all shards: one view of all, and what is said and done if one of them is down."""

import itertools
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from saga_store import Checkpoint, LogStep, SagaStatus, SagaStepStatus
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.errors import StorageUnavailableError, UnknownOutcomeError
from saga_store.sharding import ShardedSagaStorage
from tests.shard_schemas import ALL, SECRET, Shards, ids_of
from tests.verbs import Command, facts

STARTED = LogStep("pay", "act", SagaStepStatus.STARTED)
WHY = ("--reason", "ticket 7", "--by", "alice")
DOWN = 1
IDS = {shard: ids_of(shard, 3) for shard in range(3)}


@pytest.fixture
def saga(shards: Shards, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a verb of ``saga`` on three shards that have three sagas each, all of them in doubt."""
    monkeypatch.setenv("DATABASE_URL", shards.database.url())

    async def fill(storage: ShardedSagaStorage) -> None:
        for saga_id in itertools.chain.from_iterable(IDS.values()):
            await storage.save(
                Checkpoint(saga_id, name="order", context={"n": 1}, status=SagaStatus.RUNNING, steps=[STARTED])
            )

    shards.do(fill)

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        code = main(["saga", verb, *arguments])
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        return code, printed.out, printed.err

    return run


def statuses(shards: Shards) -> list[list[str]]:
    """Return what the sagas of each shard are, in the order of their ids."""
    with psycopg.connect(shards.database.url()) as connection:
        return [
            [status for (status,) in connection.execute(f"SELECT status FROM saga_{n:02}.saga_executions ORDER BY id")]  # noqa: S608 - a number
            for n in range(3)
        ]


class TestViews:
    def test_a_list_is_of_all_shards(self, saga: Command) -> None:
        """Page by page each saga comes once, under one cursor."""
        found: list[str] = []
        after: list[str] = []
        while True:
            page = facts(saga, "list", *ALL, "--limit", "4", *after)
            assert page["missing"] == []
            found += [one["id"] for one in page["sagas"]]
            if page["after"] is None:
                break
            after = ["--after", page["after"]]
        assert sorted(found) == sorted(str(saga_id) for ids in IDS.values() for saga_id in ids)

    def test_lines_are_of_all_shards(self, saga: Command) -> None:
        code, out, err = saga("list", *ALL, "--status", "RUNNING", "--ndjson")
        assert (code, err) == (Exit.DONE, "")
        assert len(out.splitlines()) == 9

    def test_stats_are_added_up(self, saga: Command) -> None:
        """And told of each shard, too."""
        figures = facts(saga, "stats", *ALL)
        assert figures["unfinished"] == [{"name": "order", "condition": "active", "count": 9}]
        assert [figures["shards"][place]["unfinished"][0]["count"] for place in "012"] == [3, 3, 3]
        assert figures["in_doubt_steps"] == 9

    @pytest.mark.parametrize(
        "line", [("list",), ("stuck", "--stale-after", "0"), ("stats",), ("interventions",)], ids=lambda line: line[0]
    )
    def test_what_is_missing_is_said(self, saga: Command, shards: Shards, line: tuple[str, ...]) -> None:
        """In the view, on stderr in one line with the reason, in JSON, and by the exit code."""
        down = shards.without(DOWN)
        code, out, err = saga(*line, *down)
        assert code == Exit.PARTLY
        assert "without shard 1, which can't be reached" in out
        [said] = err.splitlines()
        assert said.startswith("saga-store: shard 1 can't be reached: couldn't get a connection: ")
        assert said.endswith("; its sagas are missing here")
        assert facts(saga, *line, *down, code=Exit.PARTLY)["missing"] == [DOWN]
        code, _, err = saga(*line, *down, "--ndjson")
        assert (code, err.count("shard 1")) == (Exit.PARTLY, 1)

    def test_what_is_stuck_elsewhere_is_told(self, saga: Command, shards: Shards) -> None:
        """The groups are of the shards that answer, and there may be more of each."""
        assert facts(saga, "stuck", "--stale-after", "0", *ALL, code=Exit.ATTENTION)["groups"][0]["count"] == 9
        [group] = facts(saga, "stuck", "--stale-after", "0", *shards.without(DOWN), code=Exit.PARTLY)["groups"]
        assert (group["count"], group["is_partial"]) == (6, True)

    @pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
    @pytest.mark.parametrize("down", [(DOWN,), (0, 1, 2)], ids=str)
    def test_nothing_of_a_url_is_shown_that_is_secret(
        self, saga: Command, shards: Shards, driver: str, down: tuple[int, ...]
    ) -> None:
        """Not even where the server itself repeats it; ``saga`` looks at both outputs, and here at the log."""
        url = f"{shards.database.url(driver)}?options=-c%20statement_timeout%3D{SECRET}"
        tables = [f'[[shards]]\nschema = "saga_{n:02}"\n' + (f'url = "{url}"\n' if n in down else "") for n in range(3)]
        path = shards.folder / "secret.toml"
        path.write_text("".join(tables))
        for options in ((), ("--json",)):
            code, out, err = saga("list", "--shards", str(path), *options)
            assert code == (Exit.PARTLY if down == (DOWN,) else Exit.FAILED)
            assert 'invalid value for parameter "statement_timeout": "***"' in err
            assert options or down != (DOWN,) or "without shard 1" in out

    def test_no_shard_answers(self, saga: Command, shards: Shards) -> None:
        code, out, err = saga("list", *shards.without(0, 1, 2))
        assert (code, out) == (Exit.FAILED, "")
        assert err.startswith("saga-store: none of 3 shards can be reached; shard 0 can't be reached: ")
        assert err.count("\n") == 1

    @pytest.mark.parametrize("verb", ["show", "follow"])
    def test_one_saga(self, saga: Command, shards: Shards, verb: str) -> None:
        """By its whole id it is found if its shard answers, whatever the others do; so are commands to mend it."""
        command = ("show", "--follow") if verb == "follow" else ("show",)
        if verb == "follow":
            saga("give-up", "--name", "order", *ALL, *WHY, "--yes")
        down = shards.without(DOWN)
        code, out, err = saga(*command, str(IDS[0][0]), *down)
        assert (code, err) == (Exit.DONE, "")
        assert str(IDS[0][0]) in out
        assert verb == "follow" or f"--shards {down[1]}" in out.replace("\\\n      ", "")
        code, out, err = saga(*command, str(IDS[DOWN][0]), *down)
        assert (code, out, err.count("\n")) == (Exit.FAILED, "", 1)
        assert err.startswith("saga-store: shard 1 can't be reached: ")

    def test_one_saga_by_its_first_digits(self, saga: Command, shards: Shards) -> None:
        """Where a shard is missing there may be another one of these digits, or the one that isn't found."""
        down = shards.without(DOWN)
        assert facts(saga, "show", IDS[0][0].hex[:8], *ALL)["missing"] == []
        assert facts(saga, "show", IDS[0][0].hex[:8], *down, code=Exit.PARTLY)["missing"] == [DOWN]
        code, _, err = saga("show", IDS[DOWN][0].hex[:8], *down)
        assert code == Exit.FAILED
        assert "is no saga's on the shards that answer" in err
        assert "shard 1 can't be reached" in err
        code, _, err = saga("show", "ffffffff", *ALL)
        assert (code, err) == (Exit.FAILED, "saga-store: id is no saga's: 'ffffffff'\n")

    def test_one_that_was_archived(self, saga: Command, shards: Shards, tmp_path: Path) -> None:
        """It is shown from its archive, if its own shard answers."""
        saga("give-up", "--name", "order", *ALL, *WHY, "--yes")
        (tmp_path / "archives").mkdir()
        assert main(["archive", "--to", str(tmp_path / "archives"), "--failed", "0", *ALL]) == Exit.DONE
        down = shards.without(DOWN)
        code, out, _ = saga("show", str(IDS[0][0]), *down)
        assert code == Exit.DONE
        assert "Given up by alice" in out
        assert saga("show", str(IDS[DOWN][0]), *down)[0] == Exit.FAILED
        assert facts(saga, "show", str(IDS[DOWN][0]), *ALL)["saga"]["status"] == "FAILED"

    def test_they_only_look(self, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
        """New shards are shown as they are, and not made shards for good by whoever looks first."""
        monkeypatch.setenv("DATABASE_URL", shards.database.url())
        assert main(["saga", "list", "--shards", "2"]) == Exit.DONE
        assert main(["metrics", *ALL]) == Exit.DONE
        with psycopg.connect(shards.database.url()) as connection:
            assert connection.execute("SELECT count(*) FROM saga_00.saga_shard").fetchone() == (0,)


class TestRefused:
    def test_other_shards_than_there_are(self, saga: Command) -> None:
        """A number that isn't theirs is refused before anything is read, also where there are no such schemas."""
        for number, message in (("2", "missing is shard 2"), ("4", "the number of shards was chosen once")):
            code, out, err = saga("list", "--shards", number)
            assert (code, out) == (Exit.FAILED, "")
            assert message in err

    def test_a_schema_besides(self, saga: Command) -> None:
        code, _, err = saga("list", *ALL, "--schema", "saga_00")
        assert (code, err) == (
            Exit.USAGE,
            "saga-store: --schema and --shards can't be given together: shards have theirs\n",
        )

    def test_a_url_that_cant_be_used(self, saga: Command, shards: Shards) -> None:
        """The shard is named, and nothing of the URL is shown."""
        path = shards.folder / "bad.toml"
        path.write_text(f'[[shards]]\nschema = "saga_00"\n[[shards]]\nurl = "mysql://me:{SECRET}@one/x"\n')
        code, _, err = saga("list", "--shards", str(path))
        assert code == Exit.FAILED
        assert err.startswith("saga-store: shard 1: saga-store needs PostgreSQL")

    def test_a_shard_that_isnt_migrated(self, saga: Command, shards: Shards) -> None:
        """It is told which command says more."""
        with psycopg.connect(shards.database.url(), autocommit=True) as connection:
            connection.execute("DROP TABLE saga_01.saga_shard")
        code, _, err = saga("list", *ALL)
        assert code == Exit.FAILED
        assert "the saga tables in schema 'saga_01' are missing or too old" in err
        assert "`saga-store check --shards 3` tells of each shard" in err

    def test_a_privilege_is_lacking(self, saga: Command, shards: Shards) -> None:
        """The shard is named, with the GRANT that its owner has to run."""
        with psycopg.connect(shards.database.url(), autocommit=True) as connection:
            connection.execute("CREATE ROLE looker LOGIN PASSWORD 'x'")
            try:
                for n in range(3):
                    connection.execute(f"GRANT USAGE ON SCHEMA saga_{n:02} TO looker")
                    connection.execute(f"GRANT SELECT ON saga_{n:02}.saga_shard TO looker")
                url = shards.database.address.set(username="looker", password="x")  # noqa: S106 - of the test's own
                code, _, err = saga("list", *ALL, "--url", url.render_as_string(hide_password=False))
            finally:
                connection.execute("DROP OWNED BY looker")
                connection.execute("DROP ROLE looker")
        assert code == Exit.FAILED
        assert "saga-store: shard 0, schema saga_00: the role looker may not look at sagas" in err
        assert "GRANT SELECT ON TABLE saga_00.saga_executions TO looker;" in err


class TestInterventions:
    def test_they_go_to_the_sagas_shard(self, saga: Command, shards: Shards) -> None:
        """By an id, whole or not, and by filters; then they are listed."""
        saga("give-up", str(IDS[0][0]), *ALL, *WHY)
        saga("give-up", IDS[1][1].hex[:8], *ALL, *WHY)
        assert statuses(shards) == [
            ["FAILED", "RUNNING", "RUNNING"],
            ["RUNNING", "FAILED", "RUNNING"],
            ["RUNNING"] * 3,
        ]
        done = facts(saga, "settle", "--step", "pay", "--status", "FAILED", *ALL, *WHY, "--yes")
        assert (done["counts"], done["missing"]) == ({"done": 9}, [])
        acts = facts(saga, "interventions", *ALL)["interventions"]
        assert sorted(one["verb"] for one in acts) == ["give_up_saga"] * 2 + ["settle_step"] * 9

    def test_an_unknown_outcome_beside_a_shard_that_is_away(
        self, saga: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What nobody knows the outcome of may have been written, so it is told, and not just that one is away."""

        async def losing(self: ShardedSagaStorage, saga_id: UUID, **_: object) -> None:
            if self.shard_of(saga_id) == 0:
                raise UnknownOutcomeError(saga_id)
            raise StorageUnavailableError("away")

        monkeypatch.setattr(ShardedSagaStorage, "give_up_saga", losing)
        told = facts(saga, "give-up", "--name", "order", *ALL, *WHY, "--yes", code=Exit.PARTLY)
        assert told["counts"] == {"unknown": 1, "failed": 2, "not tried": 6}

    def test_those_of_the_shards_that_answer_are_done(self, saga: Command, shards: Shards) -> None:
        """It ends as partly done; the same again, when the shard is back, does the rest."""
        line = ("give-up", "--name", "order", *WHY, "--yes")
        down = shards.without(DOWN)
        plan = facts(saga, *line, *down, "--dry-run", code=Exit.PARTLY)
        assert (plan["count"], plan["missing"]) == (6, [DOWN])
        code, out, err = saga(*line, *down)
        assert code == Exit.PARTLY
        assert "6 of 6 sagas: given up" in out
        assert "without shard 1, which can't be reached" in out
        assert err.count("shard 1") == 1
        assert statuses(shards) == [["FAILED"] * 3, ["RUNNING"] * 3, ["FAILED"] * 3]
        assert facts(saga, *line, *ALL)["counts"] == {"done": 3}
        assert statuses(shards) == [["FAILED"] * 3] * 3

    def test_a_plan_goes_on_past_a_shard_that_is_down(self, saga: Command, shards: Shards) -> None:
        """Its sagas are told as failed or not tried, those of the others are done; the plan again does the rest."""
        plan = shards.folder / "plan.json"
        _, out, _ = saga("give-up", "--name", "order", *ALL, *WHY, "--dry-run", "--json")
        plan.write_text(out)
        line = ("give-up", "--plan", str(plan), *WHY, "--yes")
        done = facts(saga, *line, *shards.without(DOWN), code=Exit.PARTLY)
        assert (done["counts"], done["missing"]) == ({"done": 6, "failed": 1, "not tried": 2}, [DOWN])
        assert {one["saga_id"] for one in done["results"] if one["outcome"] != "done"} == {
            str(one) for one in IDS[DOWN]
        }
        assert facts(saga, *line, *ALL, code=Exit.PARTLY)["counts"] == {"done": 3, "changed": 6}
        assert statuses(shards) == [["FAILED"] * 3] * 3

    def test_a_saga_whose_shard_is_down_is_refused(self, saga: Command, shards: Shards) -> None:
        """And so are first digits, which may be another saga's there; by its whole id one elsewhere is mended."""
        down = shards.without(DOWN)
        code, _, err = saga("give-up", str(IDS[DOWN][0]), *down, *WHY)
        assert (code, err.count("\n")) == (Exit.FAILED, 1)
        assert err.startswith("saga-store: nothing was written: shard 1 can't be reached: ")
        code, _, err = saga("give-up", IDS[0][0].hex[:8], *down, *WHY)
        assert code == Exit.REFUSED
        assert f"give all of it, {IDS[0][0]}" in err
        assert saga("give-up", str(IDS[0][0]), *down, *WHY)[0] == Exit.DONE
        assert statuses(shards) == [["FAILED", "RUNNING", "RUNNING"], ["RUNNING"] * 3, ["RUNNING"] * 3]

    def test_a_hold_goes_there_too(self, saga: Command, shards: Shards) -> None:
        kept = str(IDS[2][0])
        assert saga("hold", kept, *ALL, *WHY)[0] == Exit.DONE
        with psycopg.connect(shards.database.url()) as connection:
            rows = connection.execute(
                "SELECT id FROM saga_02.saga_executions WHERE retain_until IS NOT NULL"
            ).fetchall()
        assert rows == [(UUID(kept),)]
        assert saga("release", kept, *ALL, *WHY)[0] == Exit.DONE
