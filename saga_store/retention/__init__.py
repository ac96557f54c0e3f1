"""Archives of finished sagas: written, verified, and only then removed from the database; and restored.

What is archived, and how, is told in docs/retention.md; the format in docs/archive-format.md, so that archives can be
read without this package. Targets need the extra ``archive``, Parquet the extra ``parquet``.
"""

from saga_store.retention.archiving import ArchiveProgress, ArchiveReport, archive
from saga_store.retention.errors import ArchiveDamagedError, ArchiveError, ShardsFailedError, TargetError
from saga_store.retention.files import Found
from saga_store.retention.policy import RetentionPolicy
from saga_store.retention.reading import ArchiveChecked, VerifyReport, find_archived, verify
from saga_store.retention.restoring import RestoreReport, restore
from saga_store.retention.target import Target

__all__ = [
    "ArchiveChecked",
    "ArchiveDamagedError",
    "ArchiveError",
    "ArchiveProgress",
    "ArchiveReport",
    "Found",
    "RestoreReport",
    "RetentionPolicy",
    "ShardsFailedError",
    "Target",
    "TargetError",
    "VerifyReport",
    "archive",
    "find_archived",
    "restore",
    "verify",
]
