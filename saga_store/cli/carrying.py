"""Carries a verb out, and makes an exit code of what goes wrong."""

import argparse

from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError

from saga_store.cli.console import Console, UnprintableError
from saga_store.cli.exits import Exit
from saga_store.cli.verbs import Run
from saga_store.errors import SagaStoreError
from saga_store.schema import MigrationLockError


def carry_out(run: Run, given: argparse.Namespace, console: Console) -> int:
    try:
        return int(run(given, console))
    except MigrationLockError as exc:
        return console.fail(exc, Exit.LOCKED)
    except (SagaStoreError, CommandError, SQLAlchemyError, UnprintableError) as exc:
        return console.fail(exc, Exit.FAILED)
    except KeyboardInterrupt:
        return console.fail(InterruptedError("interrupted"), Exit.INTERRUPTED)
