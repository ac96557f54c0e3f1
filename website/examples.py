"""The example projects as pages, so that what the documentation refers to can be read where it is read."""

from pathlib import Path

EXAMPLES = {
    "order_saga": "An order under python-cqrs: the application that `make demo` runs",
    "host_revision": "An application whose Alembic revisions call saga-store's",
    "host_branch": "An application whose Alembic has saga-store's revisions as a branch",
}
_LANGUAGES = {".py": "python", ".ini": "ini", ".mako": "mako", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def as_page(folder: Path) -> str:
    """Return all files of an example, one after the other."""
    parts = [f"# examples/{folder.name}\n\n{EXAMPLES[folder.name]}.\n"]
    for path in sorted(folder.rglob("*")):
        text = path.read_text(encoding="utf-8") if path.is_file() and path.suffix in _LANGUAGES else ""
        if text.strip():
            parts.append(f"## {path.relative_to(folder)}\n\n````{_LANGUAGES[path.suffix]}\n{text}````\n")
    return "\n".join(parts)
