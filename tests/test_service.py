"""examples/service: what its processes answer, what is left when they are killed, and whether its manifests fit it."""

import asyncio
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import yaml

from examples.service import web
from examples.service.migrate import create_tables
from examples.service.processes import Processes
from saga_store import schema
from saga_store.grants import grants
from saga_store.recovery import RecoveryWorker
from tests.browser import served
from tests.connections import free_port
from tests.databases import Database, Databases
from tests.test_grants import as_role, role_on
from tests.test_grants import run as run_script
from tests.wheel import SOURCES, Environment

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "examples" / "service"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COFFEE = {"item": "coffee", "quantity": 2, "price": 24, "address": "here"}
KILLS = 3


class TestProcesses:
    """One web process and the worker, over HTTP."""

    @pytest.fixture
    async def url(self, database: Database) -> str:
        await create_tables(database.url("asyncpg"))
        return database.url("asyncpg")

    @pytest.fixture
    def processes(self, url: str, tmp_path: Path) -> Iterator[Processes]:
        settings = {"SECONDS_AWAY": "0", "LEASE_SECONDS": "5"}
        processes = Processes(url, [free_port()], settings, log=tmp_path / "log")
        with processes.running():
            processes.wait_until_ready()
            yield processes
        log = (tmp_path / "log").read_text()
        assert "Application shutdown complete" in log
        assert "ERROR" not in log

    @pytest.fixture
    def client(self, processes: Processes) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=f"http://127.0.0.1:{processes.ports[0]}") as client:
            yield client

    def test_an_order(self, client: httpx.Client) -> None:
        """It is placed once, however often it is sent, ends paid and shipped, and its saga is shown."""
        order_id = str(uuid4())
        assert client.get(f"/orders/{order_id}").status_code == 404
        for _ in range(2):
            answer = client.put(f"/orders/{order_id}", json=COFFEE)
            assert (answer.status_code, answer.json()) == (202, {"id": order_id})
        order = ended(client, order_id)
        assert order["status"] == "COMPLETED"
        assert order["payment"]
        assert order["parcel"]
        assert "Completed at" in client.get(f"/ops/sagas/sagas/{order_id}").text

    def test_an_order_that_cant_be_shipped(self, client: httpx.Client) -> None:
        """It is undone: no payment is left, and nothing is reserved."""
        order_id = str(uuid4())
        client.put(f"/orders/{order_id}", json=COFFEE | {"address": ""})
        assert ended(client, order_id) == {"id": order_id, "status": "FAILED", "payment": None, "parcel": None}

    def test_what_nobody_can_order(self, client: httpx.Client, database: Database) -> None:
        """A bad request is refused, and leaves nothing behind."""
        assert client.put(f"/orders/{uuid4()}", json=COFFEE | {"quantity": 0}).status_code == 422
        assert client.put(f"/orders/{uuid4()}", json=COFFEE | {"item": "\0"}).status_code == 422
        with psycopg.connect(database.url()) as connection:
            assert connection.execute("SELECT count(*) FROM orders, saga_executions").fetchone() == (0,)

    def test_what_others_ask(self, client: httpx.Client, database: Database) -> None:
        """It is ready on tables of this release, and not on older ones; figures are there for Prometheus."""
        assert (client.get("/live").status_code, client.get("/ready").json()) == (200, "current")
        assert "saga_store_up 1.0" in client.get("/metrics").text
        schema.downgrade(database.url("psycopg"), "-1")
        answer = client.get("/ready")
        assert (answer.status_code, answer.json(), client.get("/live").status_code) == (503, "behind", 200)


def ended(client: httpx.Client, order_id: str) -> dict[str, Any]:
    """Return the order, once it has ended."""
    order: dict[str, Any] = client.get(f"/orders/{order_id}", params={"wait": 30}, timeout=60).json()
    assert order["status"] in {"COMPLETED", "FAILED"}
    return order


def test_it_runs_on_a_machine_as_the_page_says(database: Database, tmp_path: Path) -> None:
    """``python -m examples.service`` migrates, starts three processes, says where they are, and ends by Ctrl-C."""
    command = [sys.executable, "-m", "examples.service", "--ports", str(free_port()), str(free_port())]
    environment = os.environ | {"DATABASE_URL": database.url()}
    with (
        (tmp_path / "errors").open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as service,
    ):
        assert service.stdout
        said = next((line for line in service.stdout if "The service runs" in line), "")
        assert said, (tmp_path / "errors").read_text()
        ports = re.findall(r":(\d+)\b", said)
        assert [httpx.get(f"http://127.0.0.1:{port}/ready").status_code for port in ports] == [200, 200]
        os.killpg(service.pid, signal.SIGINT)
    assert service.returncode == 0
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_it_may_be_begun_again(databases: Databases, template: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second lifespan in one process, as in tests of a service, has the pages of its own database."""
    for _ in range(2):
        with databases.clone(template) as database:
            monkeypatch.setenv("DATABASE_URL", database.url("asyncpg"))
            asyncio.run(create_tables(database.url("asyncpg")))
            order_id = str(uuid4())
            with (
                served({"service": web.app}, lifespan="on") as addresses,
                httpx.Client(base_url=addresses["service"]) as client,
            ):
                client.put(f"/orders/{order_id}", json=COFFEE)
                assert ended(client, order_id)["status"] == "COMPLETED"
                assert client.get(f"/ops/sagas/sagas/{order_id}").status_code == 200


def test_a_role_of_its_own_may_do_what_it_has_to(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the migration grants, with the script of `saga-store grants`, is enough for orders that end either way."""
    with role_on(database, f"shop'\"{uuid4().hex[:8]}") as role:
        run_script(database, grants(role))
        asyncio.run(create_tables(database.url("asyncpg"), role))
        monkeypatch.setenv("DATABASE_URL", as_role(database, role).url("asyncpg"))
        with (
            served({"service": web.app}, lifespan="on") as addresses,
            httpx.Client(base_url=addresses["service"]) as client,
        ):
            for order, status in ((COFFEE, "COMPLETED"), (COFFEE | {"address": ""}, "FAILED")):
                order_id = str(uuid4())
                assert client.put(f"/orders/{order_id}", json=order).status_code == 202
                assert ended(client, order_id)["status"] == status
            assert client.get("/ready").status_code == 200


def test_killed_processes_leave_no_order_half_done(database: Database) -> None:
    """A short form of `make service-kills`: web and worker die by SIGKILL under load, and every order is one whole."""
    line = [sys.executable, "-m", "tests.service_kills", "--orders", "30", "--kills", str(KILLS)]
    done = subprocess.run(
        [*line, "--url", database.url()], capture_output=True, text=True, check=False, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [kills] = re.findall(r"^30 orders, (\d+) kills .* 0 inconsistent$", done.stdout, re.MULTILINE)
    assert int(kills) >= KILLS


Manifest = dict[str, Any]


def manifests() -> list[Manifest]:
    return [
        one for path in sorted((SERVICE / "kubernetes").glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())
    ]


def with_pods() -> list[Any]:
    found = [
        pytest.param(one, id=one["metadata"]["name"]) for one in manifests() if one["kind"] in {"Job", "Deployment"}
    ]
    assert len(found) == 3
    return found


def dockerfile() -> list[tuple[str, str]]:
    """Return its instructions, without comments."""
    lines = [line for line in (SERVICE / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def compose() -> Manifest:
    found: Manifest = yaml.safe_load((SERVICE / "compose.yaml").read_text())
    return found


def is_run_here(command: list[str]) -> bool:
    """Whether a command is a module of the example's, or the web process's."""
    if command[:2] == ["python", "-m"]:
        return importlib.util.find_spec(command[2]) is not None
    return command[:2] == ["uvicorn", "examples.service.web:app"] and hasattr(web, "app")


def grace_of_a_worker() -> float:
    default: float = inspect.signature(RecoveryWorker).parameters["grace"].default.total_seconds()
    return default


class TestDockerfile:
    def test_what_it_copies_is_there_and_is_enough(self, installed: Environment, tmp_path: Path) -> None:
        """From the wheel and the copied folders alone, each command begins."""
        for name, rest in dockerfile():
            if name == "COPY" and not rest.startswith("--from"):
                *sources, target = shlex.split(rest)
                assert all((ROOT / source).exists() for source in sources), rest
                if target.startswith("examples"):
                    [source] = sources
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / "examples").mkdir(exist_ok=True)
                    copy(ROOT / source, tmp_path / target)
        imported = "import examples.service.web, examples.service.worker, examples.service.migrate"
        done = installed.run("python", "-c", imported, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    def test_it_builds_of_what_the_wheel_is_of(self) -> None:
        """Also of the plugin for pytest, which the wheel's metadata names as an entry point."""
        copied = {
            source
            for name, rest in dockerfile()
            if name == "COPY" and not rest.startswith("--from")
            for source in shlex.split(rest)[:-1]
        }
        assert copied >= set(SOURCES)

    def test_it_installs_what_there_is(self) -> None:
        """The extras exist, and Python is one that is supported."""
        [install] = [rest for name, rest in dockerfile() if name == "RUN"]
        [extras] = re.findall(r"\.\[([\w,]+)\]", install)
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
        for image in [rest for name, rest in dockerfile() if name == "FROM"]:
            [version] = re.findall(r"^python:([\d.]+)-slim", image)
            assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]

    def test_its_command_is_the_web_process(self) -> None:
        [command] = [json.loads(rest) for name, rest in dockerfile() if name == "CMD"]
        [exposed] = [rest for name, rest in dockerfile() if name == "EXPOSE"]
        assert is_run_here(command)
        assert command[command.index("--port") + 1] == exposed == "8000"


class TestCompose:
    def test_its_commands_are_there(self) -> None:
        services = compose()["services"]
        assert set(services) == {"db", "migrate", "web", "worker"}
        for name in ("migrate", "worker"):
            assert is_run_here(services[name]["command"])

    def test_it_builds_from_the_project(self) -> None:
        build = compose()["services"]["web"]["build"]
        assert (SERVICE / build["context"]).resolve() == ROOT
        assert ROOT / build["dockerfile"] == SERVICE / "Dockerfile"

    def test_nobody_begins_before_the_migration(self) -> None:
        services = compose()["services"]
        assert services["migrate"]["depends_on"] == {"db": {"condition": "service_healthy"}}
        for name in ("web", "worker"):
            assert services[name]["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}

    def test_the_database_is_healthy_once_others_reach_it(self) -> None:
        """Over TCP: while the image initialises, a server that is about to end answers on the socket."""
        [_, check] = compose()["services"]["db"]["healthcheck"]["test"]
        assert shlex.split(check)[:3] == ["pg_isready", "--host", "127.0.0.1"]

    def test_the_database_is_the_one_that_is_used(self) -> None:
        services = compose()["services"]
        said = services["db"]["environment"]
        address = f"{said['POSTGRES_USER']}:{said['POSTGRES_PASSWORD']}@db:5432/{said['POSTGRES_DB']}"
        assert services["web"]["environment"] == {"DATABASE_URL": f"postgresql+asyncpg://{address}"}


class TestKubernetes:
    @pytest.mark.parametrize("manifest", with_pods())
    def test_its_commands_are_there(self, manifest: Manifest) -> None:
        [container] = manifest["spec"]["template"]["spec"]["containers"]
        assert is_run_here(container.get("command", ["uvicorn", "examples.service.web:app"]))
        migrates = manifest["kind"] == "Job"
        assert [one["name"] for one in container["env"]] == ["DATABASE_URL", *["APPLICATION_ROLE"] * migrates]

    @pytest.mark.parametrize("manifest", with_pods())
    def test_what_selects_finds_its_pods(self, manifest: Manifest) -> None:
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        assert labels == manifest["metadata"]["labels"]
        if manifest["kind"] == "Deployment":
            assert manifest["spec"]["selector"]["matchLabels"] == labels

    def test_what_selects_the_web_processes_finds_them(self) -> None:
        [web, service, budget] = [
            one for one in manifests() if "web" in str(one["metadata"]) or one["kind"] == "Service"
        ]
        labels = web["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels

    def test_what_is_asked_is_answered(self) -> None:
        """Probes and Prometheus ask for paths and ports that the web process has."""
        deployment, *_ = yaml.safe_load_all((SERVICE / "kubernetes" / "web.yaml").read_text())
        pod = deployment["spec"]["template"]
        [container] = pod["spec"]["containers"]
        paths = {str(getattr(route, "path", "")) for route in web.routes.routes}
        probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("readiness", "liveness")]
        scraped = pod["metadata"]["annotations"]
        assert {probe["path"] for probe in probes} | {scraped["prometheus.io/path"]} <= paths
        assert container["ports"] == [{"name": "http", "containerPort": 8000}]
        assert ({probe["port"] for probe in probes}, scraped["prometheus.io/port"]) == ({"http"}, "8000")

    def test_a_pod_has_time_to_end(self) -> None:
        """Longer than uvicorn waits for requests, and a worker for what is at work."""
        [command] = [json.loads(rest) for name, rest in dockerfile() if name == "CMD"]
        needed = float(command[command.index("--timeout-graceful-shutdown") + 1]) + grace_of_a_worker()
        for one in manifests():
            if one["kind"] == "Deployment":
                assert one["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed
        assert float(compose()["services"]["web"]["stop_grace_period"].removesuffix("s")) > needed
