"""The verbs that keep and let go: what they do, print and return, and what they refuse in one line."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from saga_store import SagaArchivedError
from saga_store.cli import main
from saga_store.cli.exits import Exit
from saga_store.sqlalchemy import SqlAlchemySagaStorage
from tests.databases import Database
from tests.retention.world import make_finished
from tests.verbs import Command, facts

SECRET = "hunter2-s3cret"  # noqa: S105 - what must not be seen
EVERYTHING = ("--completed", "0", "--failed", "0")


def on(database: Database, work: Callable[[SqlAlchemySagaStorage], Any]) -> Any:  # noqa: ANN401 - what it returns
    async def run() -> Any:  # noqa: ANN401 - likewise
        engine = create_async_engine(database.url("psycopg"), poolclass=NullPool)
        try:
            return await work(SqlAlchemySagaStorage(engine))
        finally:
            await engine.dispose()

    return asyncio.run(run())


@pytest.fixture
def ids(database: Database) -> list[UUID]:
    found: list[UUID] = on(database, lambda storage: make_finished(storage, 6))
    return found


@pytest.fixture(params=["postgresql", "postgresql+asyncpg"])
def command(
    request: pytest.FixtureRequest, database: Database, ids: list[UUID], capsys: pytest.CaptureFixture[str]
) -> Command:
    assert ids
    url = database.url().replace("postgresql", request.param, 1)

    def run(verb: str, *arguments: str) -> tuple[int, str, str]:
        code = main([*verb.split(), "--url", url, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


class TestRound:
    def test_sagas_are_archived_verified_and_restored(self, command: Command, ids: list[UUID], tmp_path: Path) -> None:
        """From a dry run to the whole target back in the table, as a person and a machine see it."""
        to = ("--to", str(tmp_path))
        plan = facts(command, "archive", *to, *EVERYTHING, "--dry-run")
        assert plan["expired"] == [
            {"name": "order", "status": "COMPLETED", "count": 4},
            {"name": "order", "status": "FAILED", "count": 2},
        ]
        assert list(tmp_path.iterdir()) == []
        code, out, _ = command("archive", *to, *EVERYTHING, "--max-sagas", "2", "--parquet", "--by", "night")
        assert code == Exit.DONE
        assert "2 sagas with 1 entries" in out
        assert "there is more: the next run goes on" in out
        done = facts(command, "archive", *to, *EVERYTHING, "--compression", "gzip")
        assert (done["sagas"], done["removed"], done["is_complete"], done["is_dry_run"]) == (4, 4, True, False)
        assert done["archives"][0]["state"] == "REMOVED"

        code, out, _ = command("archives")
        assert (code, out.count("REMOVED")) == (Exit.DONE, 2)
        assert facts(command, "archives", "--limit", "1")["archives"][0]["id"] == done["archives"][0]["id"]
        assert facts(command, "archives", "--state", "FAILED")["archives"] == []

        code, out, _ = command("verify", str(tmp_path))
        assert (code, out.split(":")[0]) == (Exit.DONE, "2 archives are what was written")
        code, out, _ = command("restore", str(ids[0]))
        assert (code, out) == (Exit.DONE, "restored 1 sagas; 0 were there already, the same\n")
        back = facts(command, "restore", "--archive", str(tmp_path), "--keep-for", "0")
        assert back == {"restored": 5, "same": 1, "other": [], "superseded": 0}

    def test_a_saga_is_shown_from_its_archive(self, command: Command, ids: list[UUID], tmp_path: Path) -> None:
        """With its context and history; it stays archived."""
        command("archive", "--to", str(tmp_path), *EVERYTHING)
        code, out, _ = command("archived", str(ids[3]))
        assert code == Exit.DONE
        assert "FAILED, version 1" in out
        assert 'act charge  card "declined"' in out
        found = facts(command, "archived", str(ids[3]), "--archive", str(tmp_path))
        assert json.loads(found["saga"]["context"])["order"] == 3
        assert [entry["status"] for entry in found["saga"]["entries"]] == ["STARTED", "COMPLETED", "FAILED"]
        code, _, err = command("archived", str(uuid4()))
        assert (code, "no archive is known to have saga" in err) == (Exit.FAILED, True)

    def test_the_view_of_a_saga_reads_its_archive(self, command: Command, ids: list[UUID], tmp_path: Path) -> None:
        """What `saga show` tells of it is what it told before, and where that was read; or why it can't be."""
        before = facts(command, "saga show", str(ids[3]), "--context")
        command("archive", "--to", str(tmp_path), *EVERYTHING)
        after = facts(command, "saga show", str(ids[3]), "--context")
        assert (after["attempts"], after["history"], after["context"]) == (
            before["attempts"], before["history"], before["context"],
        )  # fmt: skip
        assert after["saga"]["last_error"] == before["saga"]["last_error"]
        assert after["archive"]["line"] == 4
        assert after["archive"]["file"].startswith(f"file://{tmp_path}/")
        code, out, _ = command("saga show", str(ids[3])[:13], "--follow")
        assert code == Exit.DONE
        assert f"and read from {after['archive']['file']}, line 4" in out
        assert 'card "declined"' in out
        assert f"saga-store archived {ids[3]}" in out
        assert f"saga-store restore {ids[3]}" in out
        _, out, _ = command("saga show", str(ids[3]), "--ndjson")
        assert [next(iter(json.loads(line))) for line in out.splitlines()] == ["saga", *["entry"] * 3, "archive"]

        Path(after["archive"]["file"].removeprefix("file://")).unlink()
        code, out, err = command("saga show", str(ids[3]))
        assert (code, out, err.count("\n")) == (Exit.FAILED, "", 1)
        assert "was archived on" in err
        assert "its record can't be shown" in err
        assert "isn't there" in err

    def test_a_name_has_its_own_time(self, command: Command, tmp_path: Path) -> None:
        to = ("--to", str(tmp_path), "--dry-run")
        assert facts(command, "archive", *to, "--name", "order=0")["sagas"] == 6
        assert facts(command, "archive", *to, *EVERYTHING, "--name", "order=ever")["sagas"] == 0
        assert facts(command, "archive", *to, *EVERYTHING, "--name", "order=90d", "--name", "x=y=1d")["sagas"] == 0

    def test_what_was_changed_is_told_by_file_and_line(self, command: Command, tmp_path: Path) -> None:
        """By verify and restore alike; nothing is restored."""
        command("archive", "--to", str(tmp_path), *EVERYTHING, "--compression", "gzip")
        [path] = tmp_path.rglob("*.jsonl.gz")
        path.write_bytes(path.read_bytes()[:-12])

        code, out, _ = command("verify", str(tmp_path))
        assert code == Exit.FAILED
        assert f"damaged: file://{path}, line" in out
        code, _, err = command("restore", "--archive", str(tmp_path))
        assert code == Exit.FAILED
        assert err.startswith(f"saga-store: file://{path}, line")
        assert err.count("\n") == 1

    def test_a_saga_with_other_content_is_refused_and_named(
        self, command: Command, ids: list[UUID], database: Database, tmp_path: Path
    ) -> None:
        command("archive", "--to", str(tmp_path), *EVERYTHING)
        command("restore", str(ids[0]))
        on(database, lambda storage: storage.update_context(ids[0], {"newer": True}))

        code, out, _ = command("restore", "--archive", str(tmp_path))
        assert code == Exit.REFUSED
        assert f"left as it is, with other content: saga {ids[0]} (file://" in out

    def test_stubs_are_forgotten(self, command: Command, ids: list[UUID], database: Database, tmp_path: Path) -> None:
        """Those that are old enough; then their ids are free."""
        command("archive", "--to", str(tmp_path), *EVERYTHING)
        assert facts(command, "forget", "--older-than", "1d") == {"forgotten": 0, "is_complete": True}
        assert facts(command, "forget", "--older-than", "0") == {"forgotten": 6, "is_complete": True}

        on(database, lambda storage: storage.create_saga(ids[0], "order", {}))

    def test_archive_forgets_them_too(self, command: Command, ids: list[UUID], tmp_path: Path) -> None:
        to = ("archive", "--to", str(tmp_path), *EVERYTHING)
        assert facts(command, *to, "--forget-after", "1d")["forgotten"] == 0
        assert facts(command, *to, "--forget-after", "0")["forgotten"] == len(ids)
        assert facts(command, "forget", "--older-than", "0")["forgotten"] == 0

    def test_without_a_database_the_files_are_verified(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command("archive", "--to", str(tmp_path), *EVERYTHING)
        monkeypatch.delenv("DATABASE_URL", raising=False)

        assert main(["verify", str(tmp_path)]) == Exit.DONE
        assert "1 archives are what was written: 6 sagas" in capsys.readouterr().out


class TestHold:
    def test_what_is_held_stays_until_it_is_released(self, database: Database, ids: list[UUID], tmp_path: Path) -> None:
        """By its id or by filters, until a time or for ever; both are recorded with who and why."""

        def run(*line: str) -> int:
            return main([*line, "--url", database.url()])

        who = ("--by", "counsel", "--reason", "case 12")
        to = ("archive", "--to", str(tmp_path), *EVERYTHING)
        assert run("saga", "hold", str(ids[0]), *who) == Exit.DONE
        assert run("saga", "hold", "--status", "FAILED", "--until", "90d", "--yes", *who) == Exit.DONE
        assert run("saga", "hold", str(ids[1]), "--until", "2020-01-01", *who) == Exit.USAGE
        assert run(*to) == Exit.DONE
        with psycopg.connect(database.url()) as connection:
            kept = connection.execute("SELECT id FROM saga_executions WHERE archived_at IS NULL").fetchall()
        assert {saga_id for (saga_id,) in kept} == {ids[0], ids[3]}
        assert run("saga", "hold", str(ids[1]), *who) == Exit.FAILED

        history = on(database, lambda storage: storage.get_step_history(ids[0]))
        assert json.loads(history[-1].details)["by"] == "counsel"
        assert run("saga", "release", str(ids[0]), *who) == Exit.DONE
        assert run("saga", "release", str(ids[0]), *who) == Exit.REFUSED
        assert run(*to) == Exit.DONE
        assert on(database, lambda storage: storage.find_stub(ids[0])) is not None


class TestStats:
    def test_sizes_archives_and_the_lag_are_told(self, command: Command, tmp_path: Path) -> None:
        """For a person and for a machine; the lag only behind a policy that is given."""
        before = facts(command, "stats", *EVERYTHING)
        assert before["retention_lag"] > 0
        command("archive", "--to", str(tmp_path), *EVERYTHING)
        after = facts(command, "stats", "--completed", "30d")
        assert (after["retention_lag"], after["archived_sagas"], after["archives_failed_24h"]) == (0, 6, 0)
        assert after["oldest_open_archive"] == 0
        assert {size["table"] for size in after["table_bytes"]} == {"saga_executions", "saga_logs"}

        code, out, _ = command("stats")
        assert code == Exit.DONE
        assert "archived: 6 sagas" in out
        assert "saga_logs: " in out
        assert "lag" not in out


class TestPurge:
    def test_it_asks_nobody_without_a_terminal(self, command: Command, ids: list[UUID], database: Database) -> None:
        """And does nothing then; with --yes it removes, and the ledger says so."""
        with pytest.raises(SystemExit):
            command("purge", *EVERYTHING)
        code, _, err = command("purge", "--without-archive", *EVERYTHING)
        assert code == Exit.USAGE
        assert "--yes must be given where nobody can be asked" in err
        assert facts(command, "purge", "--without-archive", *EVERYTHING, "--yes") == {"removed": 6}

        code, out, _ = command("archives")
        assert "6 of 6 removed  archived nowhere" in out
        code, _, err = command("restore", str(ids[0]))
        assert code == Exit.FAILED
        assert "was removed without an archive" in err
        with pytest.raises(SagaArchivedError):
            on(database, lambda storage: storage.load_saga_state(ids[0]))

    @pytest.mark.parametrize(("answer", "code"), [("yes", Exit.DONE), ("no", Exit.REFUSED)])
    def test_it_asks_on_a_terminal(self, ids: list[UUID], database: Database, answer: str, code: Exit) -> None:
        """Nothing but yes is a yes."""
        assert ids
        ours, theirs = pty.openpty()
        line = [sys.executable, "-m", "saga_store", "purge", "--without-archive", *EVERYTHING, "--url", database.url()]
        with subprocess.Popen(line, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asked:
            os.close(theirs)
            os.write(ours, f"{answer}\n".encode())
            _, err = asked.communicate(timeout=60)
        os.close(ours)

        assert "6 sagas would be removed with their histories, and archived nowhere; write yes to do it:" in err
        assert asked.returncode == code


class TestRefused:
    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (("--completed", "30d", "--to", "/no/such/folder"), "/no/such/folder: there is no such folder; make it"),
            (("--completed", "30d", "--to", "nosuch://x"), "nosuch://x: can't be used"),
            (("--completed", "30d", "--to", f"ftp://me:{SECRET}@127.0.0.1:1/x"), "ftp://127.0.0.1:1/x: "),
            (("--to", "/tmp"), "--completed, --failed or --name must say what may go"),  # noqa: S108 - nothing is written
            (("--completed", "30d", "--max-seconds", "0", "--to", "/tmp"), "max_seconds must be"),  # noqa: S108 - as above
        ],
    )
    def test_in_one_line(self, command: Command, line: tuple[str, ...], reason: str) -> None:
        """Which names what is wrong, and no credential."""
        code, out, err = command("archive", *line)

        assert code in {Exit.FAILED, Exit.USAGE}
        assert reason in err
        assert err.count("\n") == 1
        assert SECRET not in out + err

    @pytest.mark.parametrize(
        "line",
        [
            ("archive", "--completed", "30d"),
            ("archive", "--to", "/tmp", "--completed", "-1d"),  # noqa: S108 - nothing is written
            ("archive", "--to", "/tmp", "--name", "order"),  # noqa: S108 - as above
            ("archive", "--to", "/tmp", "--completed", "30"),  # noqa: S108 - as above
            ("archive", "--to", "/tmp", "--name", "order=30"),  # noqa: S108 - as above
            ("archive", "--to", "/tmp", "--completed", "30d", "--forget-after", "730"),  # noqa: S108 - as above
            ("purge", "--without-archive", "--yes", "--failed", "30"),
            ("forget", "--older-than", "730"),
            ("restore", "--keep-for", "7"),
            ("archive", "--to", "/tmp", "--compression", "rar"),  # noqa: S108 - as above
            ("archives", "--state", "LOST"),
            ("restore", "12345"),
            ("forget",),
        ],
    )
    def test_wrong_usage(self, command: Command, line: tuple[str, ...]) -> None:
        with pytest.raises(SystemExit) as raised:
            command(*line)
        assert raised.value.code == Exit.USAGE

    def test_what_no_archive_has(self, command: Command, tmp_path: Path) -> None:
        """Nor an empty folder."""
        code, _, err = command("restore", str(uuid4()))
        assert (code, "wasn't archived from this database" in err) == (Exit.FAILED, True)
        code, _, err = command("verify", str(tmp_path))
        assert (code, "holds no archive" in err) == (Exit.FAILED, True)
        code, _, err = command("restore")
        assert (code, "saga_id must be given, or else an archive" in err) == (Exit.USAGE, True)

    def test_another_archiver_is_at_work(self, command: Command, database: Database, tmp_path: Path) -> None:
        """Its exit code is that of a lock, for cron to try again."""
        begun, done = threading.Event(), threading.Event()

        async def hold(storage: SqlAlchemySagaStorage) -> None:
            async with storage.archiving(by="somebody"):
                begun.set()
                await asyncio.to_thread(done.wait, 60)

        holder = threading.Thread(target=lambda: on(database, hold))
        holder.start()
        begun.wait(60)
        code, _, err = command("archive", "--to", str(tmp_path), *EVERYTHING)
        done.set()
        holder.join()

        assert code == Exit.LOCKED
        assert "another archiver is at work" in err


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_between_two_steps(
        self, database: Database, tmp_path: Path, number: signal.Signals
    ) -> None:
        """With what was done so far printed, and exit code 130; the next run does the rest."""
        on(database, lambda storage: make_finished(storage, 60))
        code = (
            "import sys; from saga_store.retention import archiving;"
            "archiving.archive.__kwdefaults__['sagas_per_archive'] = 1;"
            "from saga_store.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        line = [sys.executable, "-c", code, "archive", "--url", database.url(), "--to", str(tmp_path), *EVERYTHING]
        with subprocess.Popen([*line, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
            deadline = time.monotonic() + 60
            while not list(tmp_path.rglob("*.manifest.json")) and time.monotonic() < deadline:
                time.sleep(0.01)
            running.send_signal(number)
            out, err = running.communicate(timeout=60)

        assert running.returncode == Exit.INTERRUPTED, out + err
        done = json.loads(out)
        assert done["is_complete"] is False
        assert 0 < done["removed"] == done["sagas"] < 60
        assert "ending after this step" in err
