"""Under which licences the libraries are that saga-store uses, as their own metadata has it."""

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "licences.md"
# What is for whoever works on saga-store itself, and travels with nobody's application.
OURS = {"bench", "dev", "docs"}
HEAD = """\
# Licences

saga-store is under the MIT licence. It contains no code of others. What it uses is installed beside it, under the
licence that each library's own metadata names; `make licences` writes this page.

| Library | Licence | Needed by |
|---|---|---|
"""
CLASSIFIER = "License :: OSI Approved :: "


def libraries() -> dict[str, set[str]]:
    """Return what is required, and by which extras; the package itself is called that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"saga-store": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, set[str]] = {}
    for group, requirements in groups.items():
        for requirement in requirements if group not in OURS else ():
            name = Requirement(requirement).name.lower()
            if name != "saga-store":
                found.setdefault(name, set()).add("saga-store" if group == "saga-store" else f"[{group}]")
    return found


def licence(name: str) -> str | None:
    """Return what a library says of itself; None if it isn't installed here."""
    try:
        told = metadata(name)
    except PackageNotFoundError:
        return None
    classified = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier", []) if line.startswith(CLASSIFIER)]
    written = (told["License"] or "").strip().splitlines() if "License" in told else []
    [expression, *_] = told.get_all("License-Expression", [""])
    return expression or ", ".join(classified) or (written[0] if written else "see its documentation")


def rows() -> dict[str, str]:
    """Return the table's lines, without those of libraries that aren't installed here."""
    return {
        name: f"| {name} | {found} | {', '.join(sorted(groups))} |"
        for name, groups in sorted(libraries().items())
        if (found := licence(name)) is not None
    }


if __name__ == "__main__":
    PAGE.write_text(HEAD + "\n".join(rows().values()) + "\n")
