"""What MkDocs calls while it builds: pages that are made of the code, and links that lead out of docs/.

The pages are Markdown that reads well in a checkout, too; so links are what they are there, and are turned here.
"""

import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website import command_line, tables
from website.examples import NAMES, as_page

ROOT = Path(__file__).resolve().parent.parent
# Documents of the checkout that are pages, too, by where they stand there.
COPIED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "licence.md",
}
EXAMPLES = {f"examples/{name}": f"examples/{name}.md" for name in NAMES}
GENERATED: Mapping[str, Callable[[], str]] = {
    "command line": command_line.as_markdown,
    "tables": tables.as_markdown,
}

_LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
_MARK = re.compile(r"^<!-- generated: (.*) -->$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give each example its place, and pages that mkdocs.yml doesn't name one at the end."""
    docs, nav = Path(config.docs_dir), config.nav or []
    unplaced = sorted({str(path.relative_to(docs)) for path in docs.rglob("*.md")} - set(_pages_in(nav)))
    config.nav = [*nav, {"Examples": list(EXAMPLES.values())}, *([{"Other": unplaced}] if unplaced else [])]
    return config


def _pages_in(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _pages_in(part)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    for source, page in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_turned(text, source)))
    for name in NAMES:
        files.append(File.generated(config, EXAMPLES[f"examples/{name}"], content=as_page(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - MkDocs passes them by name
    """Put in what is generated, and turn the links of what stands in docs/."""
    made = _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)
    return made if page.file.generated_by else _turned(made, f"docs/{page.file.src_uri}")


def _turned(markdown: str, source: str) -> str:
    """Return the text of a document with its links as they are in the site."""
    own = COPIED.get(source, source.removeprefix("docs/"))

    def turn(link: re.Match[str]) -> str:
        url = urlsplit(link[0])
        if url.scheme or not url.path:
            return link[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), url.path))
        page = target.removeprefix("docs/") if target.startswith("docs/") else COPIED.get(target)
        if page is None:
            page = EXAMPLES.get("/".join(target.split("/")[:2]))  # a file of it stands on the same page
        if page is None:
            raise PluginError(f"{source} links to {link[0]}, which is no page of the site: see website/hooks.py")
        return url._replace(path=posixpath.relpath(page, posixpath.dirname(own) or ".")).geturl()

    return _LINK.sub(turn, markdown)
