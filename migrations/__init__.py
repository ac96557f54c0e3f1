"""The revisions of the schema, and what an application's own Alembic needs to run them among its own.

In the checkout this is the folder ``migrations``; installed, it is the package ``saga_store.migrations``.
"""

from saga_store.schema.embedding import downgrade, record_version, upgrade
from saga_store.schema.scripts import SCRIPTS, VERSION_TABLE, make_config
from saga_store.sqlalchemy import Base

__all__ = [
    "SCRIPTS",
    "VERSIONS",
    "VERSION_TABLE",
    "downgrade",
    "include_name",
    "make_config",
    "record_version",
    "upgrade",
]

VERSIONS = str(SCRIPTS / "versions")
"""The folder of the revisions, for ``version_locations``."""


def include_name(name: str | None, kind: str, _parents: object) -> bool:
    """Leave saga-store's tables out of an application's autogenerate, which would propose to drop them.

    Pass it as ``include_name`` to ``context.configure`` in the application's env.py, or call it in a function there
    that leaves out more.
    """
    return kind != "table" or name not in {*Base.metadata.tables, VERSION_TABLE}
