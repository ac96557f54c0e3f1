"""What a person sees in a terminal of 60, 80 and 200 columns, as files that a reviewer can read: tests/screens/*.txt.

Time stands still there, so it is the same each time. ``make screens`` writes them anew; a change shows in the review.
"""

import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from saga_store import schema
from saga_store.cli import main
from saga_store.cli.blocks import width
from saga_store.testing.postgres.restartable import restartable
from tests.databases import Database, Databases
from tests.terminal import SGR, Terminal, shown
from tests.troubled import NOW, make_hostile_saga, make_saga, make_troubled_sagas, stop_the_clock
from tests.typist import PROMPT

FOLDER = Path(__file__).parent / "screens"
WIDTHS = (60, 80, 200)
SCREENS = {
    "list": "saga list --limit 12",
    "list of none": "saga list --name none",
    "stuck": "saga stuck",
    "show in doubt": "saga show 7b0ffe96",
    "show exhausted": "saga show 82b94010",
    "show held": "saga show cf7a4420",
    "show given up": "saga show 09a11184",
    "show completed": "saga show 5e8ff674",
    "show without history": "saga show 31641290",
    "interventions": "saga interventions --since 2026-11-01",
    "dry run": "saga retry --condition exhausted --reason 'the gateway is back' --by bob --dry-run",
    "too few digits": "saga show 1f79a50",
    "hostile list": "saga list --created-after 2026-11-26T02:03:30 --created-before 2026-11-26T02:04:30",
    "hostile stuck": "saga stuck --created-after 2026-11-26T02:03:30 --created-before 2026-11-26T02:04:30",
    "hostile show": "saga show 883111b8 --context",
    # The first of two shards; nobody listens where the other one should be.
    "list without a shard": "saga list --limit 3 --shards tests/without_a_shard.toml",
    "stuck without a shard": "saga stuck --shards tests/without_a_shard.toml",
    "show without a shard": "saga show 5e8ff674 --shards tests/without_a_shard.toml",
    "retry without a shard": "saga retry --condition exhausted --reason x --dry-run "
    "--shards tests/without_a_shard.toml",
}
# Ours are line ends and what gives colours; all else of theirs is written out.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@pytest.fixture(scope="module")
def troubled(databases: Databases, template: Database) -> Iterator[Database]:
    with databases.clone(template) as database:
        with psycopg.connect(database.url(), autocommit=True) as admin:
            make_troubled_sagas(admin)
            make_hostile_saga(admin)
            admin.execute(
                "INSERT INTO public.saga_shard (cluster, shard, shards, hash) VALUES (%s, 0, 2, 'crc32')", [UUID(int=1)]
            )
        yield database


@pytest.fixture(scope="module", params=WIDTHS)
def columns(request: pytest.FixtureRequest) -> int:
    width: int = request.param
    return width


@pytest.fixture(scope="module")
def session(troubled: Database, columns: int) -> Terminal:
    """All that is typed in one terminal."""
    with Terminal.running(
        *SCREENS.values(), columns=columns, module="tests.typist", DATABASE_URL=troubled.url()
    ) as terminal:
        assert terminal.end() == 0
    return terminal


def check(name: str, columns: int, text: str) -> None:
    path = FOLDER / f"{name.replace(' ', '_')}-{columns}.txt"
    if os.environ.get("SAGA_STORE_WRITE_SCREENS"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, "if that is meant, `make screens` writes it down"


def assert_only_text(raw: str) -> None:
    """Nothing but text, line ends and colours."""
    text = SGR.sub("", raw)
    assert {char for char in text if unicodedata.category(char) in HIDDEN} <= {"\n"}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen(session: Terminal, columns: int, name: str) -> None:
    """It is as written down: the line that was typed, what is shown, and the exit code."""
    screens = [f"{PROMPT}{screen}" for screen in session.text.split(PROMPT)[1:]]
    check(name, columns, screens[list(SCREENS).index(name)])


def test_nothing_is_too_wide(session: Terminal, columns: int) -> None:
    """Nothing goes beyond the terminal's right end, but what is to be copied, and the context."""
    copied = re.compile(r"    saga-store |      --|there are more|\s+\"z|\$ |saga-store: ")
    lines = [line for line in session.text.splitlines() if not copied.match(line)]
    assert [line for line in lines if width(line) > columns] == []


def test_nothing_but_text_gets_through(session: Terminal) -> None:
    """Whatever names, steps, owners and errors hold: no control, bidi or invisible character of it."""
    assert_only_text(session.raw)
    assert r"z\e[31m\x9b2J\u202egnp.\u200b\u2028[bold]<script>" in session.text


class TestTerminals:
    def test_a_dumb_one(self, troubled: Database) -> None:
        """Gets no escape at all; lines are cut where it ends."""
        typed = [SCREENS[name] for name in ("list", "show in doubt", "hostile show")]
        with Terminal.running(
            *typed, columns=80, module="tests.typist", TERM="dumb", DATABASE_URL=troubled.url()
        ) as terminal:
            assert terminal.end() == 0
        assert "\x1b" not in terminal.raw
        assert_only_text(terminal.raw)
        check("dumb", 80, terminal.text)

    def test_without_rich(self, troubled: Database, tmp_path: Path) -> None:
        """What the extra adds is colours and bars; without it everything is there, and nobody is nagged."""
        (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('no rich', name='rich')\n")
        code, terminal = shown(
            *("saga", "show", "7b0ffe96", "--url", troubled.url()), columns=100, PYTHONPATH=str(tmp_path)
        )
        assert (code, "\x1b" in terminal.raw) == (0, False)
        assert "Began compensating TakePayment at 2026-11-25 22:50:25, and nothing says" in terminal.text
        assert "rich" not in terminal.text

    def test_no_color(self, troubled: Database) -> None:
        """NO_COLOR leaves weights, and no colours."""
        code, terminal = shown("saga", "stuck", "--url", troubled.url(), columns=100, NO_COLOR="1")
        assert code == 7
        codes = {code for found in SGR.findall(terminal.raw) for code in found[2:-1].split(";")}
        assert codes <= {"0", "1", "2"}

    def test_a_pipe(self, troubled: Database) -> None:
        """Gets lines that are whole, without escapes, in any encoding."""
        typed = [SCREENS[name] for name in ("list", "stuck", "show in doubt", "hostile show")]
        command = [sys.executable, "-m", "tests.typist", *typed]
        environment = os.environ | {"DATABASE_URL": troubled.url(), "PYTHONIOENCODING": "ascii", "COLUMNS": "20"}
        done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        text = done.stdout.decode("ascii")
        assert_only_text(text)
        path = FOLDER / "pipe.txt"
        if os.environ.get("SAGA_STORE_WRITE_SCREENS"):
            path.write_text(text)
        assert path.read_text() == text

    def test_the_local_zone(self, troubled: Database) -> None:
        """As asked: times are shown, and understood, in the zone of whoever looks."""
        near = ("--created-after", "2026-11-26T07:39:00", "--created-before", "2026-11-26T07:41:00")
        command = ("saga", "list", "--local", *near, "--url", troubled.url())
        code, terminal = shown(*command, columns=200, TZ="Asia/Karachi")
        assert code == 0
        assert "5e8ff674" in terminal.text
        assert "2026-11-26 07:40:00 +0500" in terminal.text


class TestFollowing:
    @pytest.mark.parametrize("columns", WIDTHS)
    def test_until_it_is_finished(self, database: Database, admin: psycopg.Connection, columns: int) -> None:
        """Its story, then each change once, then how it ended; exit code 0."""
        stop_the_clock(admin)
        number = 0x3F2A9C1D
        steps = "1 act ReserveStock STARTED\n2 act ReserveStock COMPLETED"
        made = make_saga(admin, number, "order", "PENDING", NOW - timedelta(minutes=1), steps=steps)
        typed = "saga show 3f2a9c1d --follow --every 0.1"
        with Terminal.running(typed, columns=columns, module="tests.typist", DATABASE_URL=database.url()) as terminal:
            terminal.wait_for("ReserveStock")
            for seconds, change, seen in CHANGES:
                with psycopg.connect(database.url()) as worker:
                    worker.execute("UPDATE clock.hand SET now = %s", [NOW + timedelta(seconds=seconds)])
                    worker.execute(change.encode(), {"id": made, "at": NOW + timedelta(seconds=seconds)})
                terminal.wait_for(seen)
            assert terminal.end() == 0
        check("follow", columns, terminal.text)
        assert_only_text(terminal.raw)

    def test_past_a_restart_of_the_server(self) -> None:
        """Says once that the server is away, and that it is back; Ctrl-C ends it with exit code 130."""
        with restartable() as server:
            url = server.facts.url
            schema.upgrade(url)
            with psycopg.connect(url, autocommit=True) as admin:
                stop_the_clock(admin)
                made = make_saga(admin, 0x3F2A9C1D, "order", "RUNNING", NOW)
            command = ("saga", "show", "3f2a9c1d", "--follow", "--every", "0.1", "--url", url)
            with Terminal.running(*command, columns=80) as terminal:
                terminal.wait_for("no history")
                server.kill()
                terminal.wait_for("so this goes on as soon as it does")
                server.start()
                server.wait_until_ready()
                terminal.wait_for("the database answers again")
                with psycopg.connect(url, autocommit=True) as admin:
                    admin.execute("UPDATE saga_executions SET status = 'COMPENSATING' WHERE id = %s", [made])
                terminal.wait_for("RUNNING \N{RIGHTWARDS ARROW} COMPENSATING")
                terminal.type("\x03")
                assert terminal.end() == 130
        assert terminal.text.count("goes on as soon as it does") == 1
        assert terminal.text.count("COMPENSATING") == 1
        assert "Traceback" not in terminal.text

    def test_in_lines(self, database: Database, admin: psycopg.Connection, capsys: pytest.CaptureFixture[str]) -> None:
        """With --ndjson a machine gets an object for each; --json is wrong usage, for it is one object."""
        made = make_saga(admin, 1, "order", "COMPLETED", NOW, steps="1 act pay COMPLETED")
        command = ["saga", "show", str(made), "--follow", "--url", database.url()]
        assert main([*command, "--ndjson"]) == 0
        assert re.findall(r'^\{"(\w+)"', capsys.readouterr().out, re.MULTILINE) == ["saga", "entry"]
        assert main([*command, "--json"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# Seconds after it stood still, what a worker writes, and what is seen of it then.
_LOG = (
    "INSERT INTO public.saga_logs (saga_id, step_name, action, status, details, created_at) VALUES (%(id)s, {}, %(at)s)"
)
_SET = "UPDATE public.saga_executions SET {}, version = version + 1, updated_at = %(at)s WHERE id = %(id)s"
CHANGES = (
    (1, _SET.format("status = 'RUNNING', lease_owner = 'w-1', lease_expires_at = '2026-11-26 04:00Z'"), "held"),
    (2, _LOG.format("'TakePayment', 'act', 'STARTED', NULL"), "TakePayment (act) STARTED"),
    (9, _LOG.format("'TakePayment', 'act', 'FAILED', 'declined \x1b[31m \u202e'"), "TakePayment (act) FAILED"),
    (10, _SET.format("status = 'COMPENSATING'"), "COMPENSATING"),
    (11, _LOG.format("'ReserveStock', 'compensate', 'COMPENSATED', NULL"), "(compensate)"),
    (12, _SET.format("status = 'FAILED', lease_owner = NULL, lease_expires_at = NULL"), "Failed at"),
)


def test_memory_is_bounded(database: Database, admin: psycopg.Connection) -> None:
    """A history of 300 MB and a context of 50 MB cost a view nothing to speak of."""
    made = make_saga(admin, 0x3F2A9C1D, "order", "RUNNING", NOW)
    admin.execute(
        "UPDATE saga_executions SET context = json_build_object('x', repeat('x', 50000000)) WHERE id = %s", [made]
    )
    admin.execute(
        "INSERT INTO saga_logs (saga_id, step_name, action, status, details) "
        "SELECT %s, 'pay', 'act', 'FAILED', repeat('x', 1000000) FROM generate_series(1, 300)",
        [made],
    )
    # Not ru_maxrss, which begins with that of the process that started it.
    program = "import sys; from pathlib import Path; from tests.typist import main; main(sys.argv[1:]);"
    program += "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    command = [sys.executable, "-c", program, "saga", "show", "3f2a9c1d", "--url", database.url(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert len(done.stdout) < 2_000_000
    assert int(done.stdout.splitlines()[-1]) < 150 * 1024, "KiB at most"


def test_what_is_written_down() -> None:
    """There are no others in the folder."""
    screens = {f"{name.replace(' ', '_')}-{columns}.txt" for name in [*SCREENS, "follow"] for columns in WIDTHS}
    assert {path.name for path in FOLDER.glob("*")} == screens | {"dumb-80.txt", "pipe.txt"}
