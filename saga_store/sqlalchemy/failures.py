"""What the error of a database or a driver says, whichever library raised it."""

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from saga_store.sqlalchemy.pooler import ADVICE

# The server ended the connection; whether it had committed by then can't be told.
_DISCONNECT_CODES = {"57P01", "57P02", "57P03"}
_CONNECTION_CLASS = "08"
# A prepared statement that isn't there, or a name for one that is taken: the server's connection isn't ours alone.
_POOLED_CODES = {"26000", "42P05"}


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


def reason(exc: BaseException) -> str:
    """What the database or the driver said, without SQLAlchemy's wrapping and our statement."""
    wrapped = getattr(exc, "orig", None)
    said = (wrapped.__cause__ or wrapped) if wrapped else exc
    text = str(said).strip() or type(said).__name__
    # The first line alone: asyncpg advises as well, in ten lines, and on its own functions.
    return f"{text.splitlines()[0]}: {ADVICE}" if sqlstate(exc) in _POOLED_CODES else text
