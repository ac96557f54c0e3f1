"""One command for all shards: in order, with a summary, and the exit code of the worst."""

import argparse
import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path

import psycopg
import pytest

from saga_store import schema
from saga_store.cli import main
from saga_store.cli.console import Console
from saga_store.cli.exits import Exit
from saga_store.cli.retention_run import Stop, on
from saga_store.cli.shards import Shard, Shards, in_turn, url_of
from saga_store.errors import StorageUnavailableError
from saga_store.retention.over_shards import share_of
from tests.databases import Database
from tests.programs import psql


@pytest.fixture(autouse=True)
def database_url(empty_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", empty_database.url("psycopg"))


def revisions(database: Database) -> list[str | None]:
    return [schema.current(database.url("psycopg"), schema=f"saga_{number:02}") for number in range(3)]


def test_a_shard_that_fails_leaves_the_others_done_and_again_completes_it(
    empty_database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is that of the worst, and the summary says which one failed."""
    with psycopg.connect(empty_database.url(), autocommit=True) as connection:
        connection.execute("CREATE SCHEMA saga_01")
        connection.execute("CREATE TABLE saga_01.saga_executions (id int)")
        assert main(["upgrade", "--shards", "3", "--create-schema"]) == Exit.FAILED
        err = capsys.readouterr().err
        assert "2 of 3 shards done; shard 1: failed; run it again" in err
        head = schema.history()[-1].revision
        assert revisions(empty_database) == [head, None, head]
        assert main(["check", "--shards", "3", "--json"]) == Exit.BEHIND
        told = json.loads(capsys.readouterr().out)
        assert [shard["exit_code"] for shard in told["shards"]] == [0, Exit.BEHIND, 0]
        assert (told["exit_code"], told["shards"][2]["schema"]) == (Exit.BEHIND, "saga_02")
        connection.execute("DROP TABLE saga_01.saga_executions")
    assert main(["upgrade", "--shards", "3"]) == Exit.DONE
    assert revisions(empty_database) == [head] * 3
    assert main(["check", "--shards", "3"]) == Exit.DONE
    assert capsys.readouterr().err.count("3 of 3 shards done") == 2


def test_a_file_says_where_each_is(
    empty_database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can't be reached fails, and the others are done; no password is shown."""
    monkeypatch.delenv("DATABASE_URL")
    path = tmp_path / "shards.toml"
    nowhere = "postgresql+psycopg://me:secret@127.0.0.1:1/sagas"
    path.write_text(f'[[shards]]\nurl = "{nowhere}"\n[[shards]]\nurl = "{empty_database.url("psycopg")}"\n')
    assert main(["upgrade", "--shards", str(path)]) == Exit.FAILED
    shown = capsys.readouterr()
    assert "1 of 2 shards done; shard 0: failed" in shown.err
    assert "secret" not in shown.out + shown.err
    assert schema.check(empty_database.url("psycopg")).state is schema.State.CURRENT


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_one_that_never_answers_is_given_up(
    empty_database: Database,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
) -> None:
    """After as many seconds as for the verbs that take all shards as one; the others are done."""
    monkeypatch.setattr("saga_store.cli.shards._CONNECT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql+{driver}://me:secret@127.0.0.1:{silent.getsockname()[1]}/sagas"
        path = tmp_path / "shards.toml"
        path.write_text(f'[[shards]]\nurl = "{url}"\n[[shards]]\nurl = "{empty_database.url(driver)}"\n')
        began = time.monotonic()
        assert main(["current", "--shards", str(path)]) == Exit.FAILED
    assert time.monotonic() - began < 20
    shown = capsys.readouterr()
    assert "1 of 2 shards done; shard 0: failed" in shown.err
    assert "secret" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("postgresql://one/sagas", "postgresql://one/sagas?connect_timeout=10"),
        ("'postgresql://one/sagas?sslmode=disable'\n", "postgresql://one/sagas?sslmode=disable&connect_timeout=10"),
        ("postgresql://one/sagas?connect_timeout=3", "postgresql://one/sagas?connect_timeout=3"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_url_may_say_how_long_to_wait(url: str, wanted: str) -> None:
    """Also that of the command, which a shard without a URL has."""
    assert url_of(Shard(url, None), argparse.Namespace(url="")) == wanted
    assert url_of(Shard(None, "saga_00"), argparse.Namespace(url=url)) == wanted


def test_what_one_shard_took_too_long_is_not_taken_from_the_others() -> None:
    assert share_of(None, 3) is None
    assert share_of(9, 3) == 3
    assert share_of(9, 3, passed=1, done=1) == 4
    assert share_of(9, 3, passed=30, done=2) == 3


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("fails", [True, False])
def test_a_signal_ends_the_run_of_all(
    capsys: pytest.CaptureFixture[str], signal_number: signal.Signals, *, fails: bool
) -> None:
    """Also if the shard whose turn it is fails then; nothing is begun that would remove rows."""
    turns = []

    async def work(given: argparse.Namespace, _: Console, stop: Stop) -> Exit:
        turns.append(given.schema)
        if len(turns) == 2:
            os.kill(os.getpid(), signal_number)
            while not stop():  # noqa: ASYNC110 - a signal sets it
                await asyncio.sleep(0.01)
            if fails:
                raise StorageUnavailableError("the server is down")
        return Exit.DONE

    given = argparse.Namespace(
        shards=Shards("3", tuple(Shard(None, f"saga_{number:02}") for number in range(3))), json=False, max_seconds=None
    )
    assert in_turn(on(work))(given, Console(as_json=False)) == Exit.INTERRUPTED
    assert turns == ["saga_00", "saga_01"]
    err = capsys.readouterr().err
    assert ("the server is down" in err) is fails
    assert "1 of 3 shards done; shard 1: interrupted; not begun: 1 of 3" in err


def test_on_paper_it_is_one_script(empty_database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sql", "--shards", "3", "--create-schema"]) == Exit.DONE
    done = psql(empty_database, capsys.readouterr().out)
    assert (done.returncode, done.stderr) == (0, "")
    assert revisions(empty_database) == [schema.history()[-1].revision] * 3


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "must have 1 to 1000 tables"),
        ("shards = []", "must have 1 to 1000 tables"),
        ("[[shards]]", "must be a table with url, schema, or both"),
        ("[[shards]]\nuri = 'x'", "must be a table with url, schema, or both"),
        ("[[shards]]\nschema = 1", "url and schema must be strings"),
        ("[[shards]]\nschema = 'pg_x'", "shard 0: schema must not be 'pg_x'"),
        ("[[shards]]\nschema = 'a'\n[[shards]]\nschema = 'a'", "two shards have the same url and schema"),
        ("[[shards", "is no number, and no TOML file that can be read"),
        (f"shards = {'[' * 3000}{']' * 3000}", "is no number, and no TOML file that can be read"),
        ("[[shards]]\nurl = ' '\nschema = 'a'", "shard 0: url must not be empty; leave it out for the command's own"),
        ("[[shards]]\nurl = 'postgresql://'\nschema = ''", "shard 0: schema must not be empty"),
    ],
)
def test_a_file_that_says_no_such_thing_is_wrong_usage(
    tmp_path: Path, written: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shards.toml"
    path.write_text(written)
    with pytest.raises(SystemExit) as left:
        main(["check", "--shards", str(path)])
    assert left.value.code == Exit.USAGE
    assert message in capsys.readouterr().err


def test_distribute_hands_each_schema_on_by_its_name(
    empty_database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that needs quotes. What stands here for Citus has its table and its function."""
    with psycopg.connect(empty_database.url(), autocommit=True) as connection:
        connection.execute(
            'CREATE SCHEMA "Saga_01"; CREATE SCHEMA saga_01; CREATE SCHEMA saga_00;'
            "CREATE TABLE pg_dist_schema (schemaid oid);"
            "CREATE FUNCTION citus_schema_distribute(regnamespace) RETURNS void LANGUAGE sql "
            "AS 'INSERT INTO pg_dist_schema VALUES ($1)';"
            "INSERT INTO pg_extension SELECT 1, 'citus', extowner, extnamespace, extrelocatable, '13.0' "
            "FROM pg_extension LIMIT 1"
        )
        path = tmp_path / "shards.toml"
        path.write_text("[[shards]]\nschema = 'saga_00'\n[[shards]]\nschema = 'Saga_01'\n")
        for wanted in ("handed to Citus: saga_00, Saga_01", "nothing to do"):
            assert main(["distribute", "--shards", str(path)]) == Exit.DONE
            assert capsys.readouterr().out.strip() == wanted
        placed = connection.execute("SELECT nspname FROM pg_dist_schema JOIN pg_namespace n ON n.oid = schemaid")
        assert {name for (name,) in placed} == {"saga_00", "Saga_01"}


def test_distribute_says_where_there_is_no_citus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distribute", "--shards", "2"]) == Exit.FAILED
    assert "there is no Citus in this database" in capsys.readouterr().err
