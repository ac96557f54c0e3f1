"""The example projects as pages, so that what the documentation refers to can be read where it is read."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir() and any(path.rglob("*.py")))
_LANGUAGES = {
    ".py": "python",
    ".ini": "ini",
    ".mako": "mako",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".toml": "toml",
    ".md": "markdown",
    ".txt": "text",
    "": "text",
}


def as_page(name: str) -> str:
    """Return all files of an example, one after the other."""
    folder = FOLDER / name
    parts = [f"# examples/{name}\n"]
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in _LANGUAGES:
            text = path.read_text(encoding="utf-8")
            if text.strip():
                parts.append(f"## {path.relative_to(folder)}\n\n````{_LANGUAGES[path.suffix]}\n{text}````\n")
    return "\n".join(parts)
