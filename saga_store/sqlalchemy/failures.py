"""What the error of a database or a driver says, whichever library raised it."""

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from saga_store.sqlalchemy.pooler import ADVICE

READ_ONLY = "25006"

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


def sqlstate(exc: BaseException) -> str | None:
    """PostgreSQL's five-letter code, if it sent one."""
    code = getattr(getattr(exc, "orig", exc), "sqlstate", None)
    return code if isinstance(code, str) else None


def is_lost(exc: BaseException) -> bool:
    """Whether the connection died, so that the server's verdict on the statement is unknown."""
    if isinstance(exc, DBAPIError) and exc.connection_invalidated:
        return True
    code = sqlstate(exc)
    if code is None:
        # SQLAlchemy's own errors are raised before anything is sent.
        return isinstance(exc, DBAPIError) or not isinstance(exc, SQLAlchemyError)
    return code in _DISCONNECT_CODES or code.startswith(_CONNECTION_CLASS)


def cannot_connect_now(exc: BaseException) -> bool:
    """Whether connecting failed for a reason that may pass; psycopg doesn't say, so for it this is always so."""
    code = sqlstate(exc)
    if code is None:
        # An argument that the driver doesn't understand, or a certificate that it doesn't trust.
        is_setting = isinstance(exc, TypeError | ValueError) or isinstance(exc.__cause__, TypeError | ValueError)
        return not is_setting and (isinstance(exc, DBAPIError) or not isinstance(exc, SQLAlchemyError))
    return code in _DISCONNECT_CODES or code.startswith(_CONNECTION_CLASS) or code == _TOO_MANY_CONNECTIONS


def reason(exc: BaseException) -> str:
    """What the database or the driver said, without SQLAlchemy's wrapping and our statement."""
    wrapped = getattr(exc, "orig", None)
    said = (wrapped.__cause__ or wrapped) if wrapped else exc
    text = str(said).strip() or type(said).__name__
    # The first line alone: asyncpg advises as well, in ten lines, and on its own functions.
    return f"{text.splitlines()[0]}: {ADVICE}" if sqlstate(exc) in POOLED_CODES else text
