"""The documents, and the code blocks that stand in them."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.databases import Database

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
}

EXAMPLE_URL = re.compile(r"postgresql(?:\+(\w+))?://user:password@localhost:5432/shop")
FENCE = re.compile(r"^ *```", re.MULTILINE)
_FENCED = re.compile(r"^( *)```(.*)\n((?:(?! *```).*\n)*) *```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block: where it stands, its language, and its text."""

    page: str
    section: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]

    @property
    def tests_something(self) -> bool:
        return self.language == "python" and "class Test" in self.text

    def on(self, database: Database) -> str:
        """Return the text with the test's database in place of the example's."""
        return EXAMPLE_URL.sub(lambda found: database.url(found[1]), self.text)

    @property
    def printed(self) -> list[str]:
        """What the comments say that the block prints: behind each ``print(...)``, or in the lines below it."""
        lines = iter(self.text.splitlines())
        said = []
        for line in lines:
            if "print(" in line and "  # " in line:
                said.append(line.partition("  # ")[2])
            elif "print(" in line:
                for below in lines:
                    if not below.strip().startswith("# "):
                        break
                    said.append(below.strip().removeprefix("# "))
        return said


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a document, ``README.md`` or ``docs/...``."""
    document = DOCUMENTS[page]
    blocks = []
    for found in _FENCED.finditer(document):
        before = document[: found.start()]
        sections = re.findall(r"^## (.*)$", before, re.MULTILINE)
        line = before.count("\n") + 2
        text = re.sub(f"^{found[1]}", "", found[3], flags=re.MULTILINE)
        blocks.append(Block(page, sections[-1] if sections else "", line, found[2], text))
    return blocks


def without_code(document: str) -> str:
    """Return a document without its code blocks and spans, whose brackets are no links and whose # no headings."""
    return re.sub(r"`[^`\n]*`", lambda span: re.sub(r"[\[\]#]", "", span[0]), _FENCED.sub("", document))
