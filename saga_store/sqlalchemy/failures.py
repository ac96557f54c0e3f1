"""What the error of a database or a driver says, whichever library raised it."""

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from saga_store.sqlalchemy.pooler import ADVICE

READ_ONLY = "25006"
LOCK_NOT_AVAILABLE = "55P03"
CANCELED = "57014"
PERMISSION_DENIED = "42501"
# Among others: the plan of a prepared statement doesn't fit any more, since a migration has changed a column.
FEATURE_NOT_SUPPORTED = "0A000"
DATA_CLASS = "22"

# The server ended the connection; whether it had committed by then can't be told. A FATAL error that comes in place
# of an answer nearly always means that it hadn't, for interrupts are held while it commits; but between the commit
# and the answer there are a few lines where they aren't, and a pooler in between has errors of its own.
_DISCONNECT_CODES = {
    "57P01",  # terminated by an administrator, or shutting down
    "57P02",  # another backend crashed
    "57P03",  # starting up, shutting down, in recovery
    "57P04",  # the database was dropped
    "57P05",  # idle for too long
    "25P03",  # idle in a transaction for too long
}
_CONNECTION_CLASS = "08"
_TOO_MANY_CONNECTIONS = "53300"
# A prepared statement that isn't there, or a name for one that is taken: the server's connection isn't ours alone.
POOLED_CODES = {"26000", "42P05"}
# What a driver raises, with no code, about a value that it can't send.
_UNSENDABLE = (TypeError, ValueError, ArithmeticError)


def sqlstate(exc: BaseException) -> str | None:
    """PostgreSQL's five-letter code, if it sent one."""
    code = getattr(getattr(exc, "orig", exc), "sqlstate", None)
    return code if isinstance(code, str) else None


def is_lost(exc: BaseException) -> bool:
    """Whether the server's verdict on a statement is unknown, mostly since the connection died."""
    if isinstance(exc, DBAPIError) and exc.connection_invalidated:
        return True
    code = sqlstate(exc)
    if code is None:
        # SQLAlchemy's own errors are raised before anything is sent.
        return not is_unsendable(exc) and (isinstance(exc, DBAPIError) or not isinstance(exc, SQLAlchemyError))
    return code in _DISCONNECT_CODES or code.startswith(_CONNECTION_CLASS)


def is_unsendable(exc: BaseException) -> bool:
    """Whether a value can't be sent, as a text that the client encoding can't hold: then nothing was."""
    code = sqlstate(exc)
    return code.startswith(DATA_CLASS) if code else isinstance(exc, _UNSENDABLE)


def ails_connection(exc: BaseException) -> bool:
    """Whether one connection is of no use after this error, and only that one."""
    if not isinstance(exc, Exception):
        return True  # cut short: nobody knows what it is at
    return isinstance(exc, TimeoutError)  # asyncpg's command_timeout


def ails_all_connections(exc: BaseException) -> bool:
    """Whether all of a pool's connections lead to a server that went away or was demoted, or keep old plans."""
    return is_lost(exc) or sqlstate(exc) in {READ_ONLY, FEATURE_NOT_SUPPORTED}


def cannot_connect_now(exc: BaseException) -> bool:
    """Whether connecting failed for a reason that may pass; psycopg doesn't say, so for it this is always so."""
    code = sqlstate(exc)
    if code is None:
        # An argument that the driver doesn't understand, or a certificate that it doesn't trust.
        is_setting = isinstance(exc, TypeError | ValueError) or isinstance(exc.__cause__, TypeError | ValueError)
        return not is_setting and (isinstance(exc, DBAPIError | OSError) or is_drivers(exc))
    return code in _DISCONNECT_CODES or code.startswith(_CONNECTION_CLASS) or code == _TOO_MANY_CONNECTIONS


def is_drivers(exc: BaseException) -> bool:
    """Whether a driver says it, and not, for instance, a listener that the application has hung on the pool."""
    # SQLAlchemy gives asyncpg's errors classes of its own.
    return any(kind.__module__.startswith(("asyncpg", "psycopg", "sqlalchemy.dialects")) for kind in type(exc).__mro__)


def reason(exc: BaseException) -> str:
    """What the database or the driver said, without SQLAlchemy's wrapping and our statement."""
    wrapped = getattr(exc, "orig", None)
    said = (wrapped.__cause__ or wrapped) if wrapped else exc
    text = str(said).strip() or type(said).__name__
    # The first line alone: asyncpg advises as well, in ten lines, and on its own functions.
    return f"{text.splitlines()[0]}: {ADVICE}" if sqlstate(exc) in POOLED_CODES else text
