"""Write down what each revision makes of an empty database; ``make fingerprints`` runs this."""

import json
from pathlib import Path

from sqlalchemy import create_engine

import saga_store.schema
from saga_store import schema
from saga_store.schema.fingerprint import Fingerprint, read_fingerprint
from saga_store.schema.session import enter_schema
from saga_store.testing.postgres import embedded

FILE = Path(saga_store.schema.__file__).parent / "fingerprints.json"


def read_all(url: str) -> dict[str, Fingerprint]:
    """Take an empty database through all revisions, and return what each has made."""
    found = {}
    engine = create_engine(url)
    for revision in schema.history():
        schema.upgrade(engine, revision.revision)
        with engine.begin() as connection:
            enter_schema(connection, None)
            found[revision.revision] = read_fingerprint(connection)
    engine.dispose()
    return found


def main() -> None:
    with embedded() as server:
        found = read_all(server.url.replace("postgresql://", "postgresql+psycopg://"))
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")  # noqa: T201 - what the command has done


if __name__ == "__main__":
    main()
