"""Every link of a document leads to something that is there, and every anchor to a heading: in the checkout."""

import re
from pathlib import PurePosixPath

import pytest

from tests.pages import DOCUMENTS, ROOT, without_code

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(page: str) -> set[str]:
    """Return what headings are called in a URL: in lower case, without punctuation, a hyphen for each space."""
    headings = (
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text) for text in HEADING.findall(without_code(DOCUMENTS[page]))
    )
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links(page: str) -> None:
    missing = []
    for link in LINK.findall(without_code(DOCUMENTS[page])):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        name = str(PurePosixPath(target.resolve().relative_to(ROOT)))
        if not target.exists() or (anchor and anchor not in anchors(name)):
            missing.append(link)
    assert not missing
