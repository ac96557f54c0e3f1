"""What is released: its version, its metadata, its licences, and the workflow that publishes it."""

import re
import tomllib
from importlib.metadata import version

import yaml

from tests import licences
from tests.licences import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())


def test_the_version_stands_in_one_place() -> None:
    """pyproject.toml has it; the changelog tells of it; all else asks the installed package."""
    assert version("saga-store") == PROJECT["version"]
    assert re.search(rf"^## \[{re.escape(PROJECT['version'])}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    for path in (ROOT / "saga_store").rglob("*.py"):
        assert f'"{PROJECT["version"]}"' not in path.read_text(), path


def test_classifiers_say_what_is_supported() -> None:
    supported = {f"3.{minor}" for minor in range(int(PROJECT["requires-python"].rpartition(".")[2]), 15)}
    named = {found[1] for line in PROJECT["classifiers"] if (found := re.search(r"Python :: (3\.\d+)$", line))}
    assert named == supported
    assert "Typing :: Typed" in PROJECT["classifiers"]
    page = (ROOT / "docs" / "reference" / "versions.md").read_text()
    assert f"| Python | {', '.join(sorted(named))} |" in page


def test_every_library_is_listed_with_its_licence() -> None:
    """By name, and by what its metadata says where it is installed; `make licences` writes the page."""
    page = licences.PAGE.read_text()
    listed = re.findall(r"^\| ([\w.-]+) \|", page.partition("|---|")[2], re.MULTILINE)
    assert listed == sorted(licences.libraries())
    for row in licences.rows().values():
        assert row in page


def test_no_licence_asks_for_more_than_the_users_know() -> None:
    """None that would have an application published with it."""
    assert not [row for row in licences.rows().values() if re.search(r"\bA?GPL", row.replace("LGPL", ""))]


def test_the_workflow_publishes_what_was_checked_and_nothing_else() -> None:
    """One job builds and checks without rights; another one attests and publishes those files, without a password."""
    build, publish = WORKFLOW["jobs"]["build"], WORKFLOW["jobs"]["publish"]
    assert WORKFLOW[True]["push"] == {"tags": ["v*"]}  # what YAML makes of `on`
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in build
    assert {"run": "make release-check"} in build["steps"]
    assert publish["needs"] == "build"
    assert publish["permissions"]["id-token"] == "write"
    assert not any(
        "checkout" in step.get("uses", "") or "password" in step.get("with", {}) for step in publish["steps"]
    )
