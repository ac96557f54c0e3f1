"""What can go wrong with a migration."""

from alembic.util import CommandError

from saga_store.errors import SagaStoreError


class MigrationError(SagaStoreError, CommandError):
    """A migration couldn't be run, or not to its end; the message says why, and what to do.

    It is one of Alembic's errors too, so that its command prints the message in place of a traceback.
    """


class MigrationLockError(MigrationError):
    """A lock wasn't to be had in time: somebody else migrates, or holds a table. Try again later."""
