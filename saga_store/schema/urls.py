"""The one place that reads a database's URL: what it says, and what of that may be shown.

It understands what libpq and SQLAlchemy write and what hosters give out. Of what it can't understand it shows nothing,
for any part of that may be part of a password: a refusal has no cause either, for the cause's text would tell.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

from sqlalchemy import URL

from saga_store.schema.settings import MigrationError

DRIVERS = ("psycopg", "asyncpg")
HOW_TO_SET = "set DATABASE_URL, such as postgresql+psycopg://user:password@host:5432/database"

_SCHEME = re.compile(r"(?:postgres|postgresql)(?:\+(\w+))?://")
# A host with its port, as in a URL; and what can be a host: a name, or an address of version 4 or 6.
_PLACE = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([^:]*))?")
_HOST = re.compile(r"[\w.-]+|(?=[^:]*:)[0-9a-fA-F:.]+(?:%[\w.-]+)?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_LAST_PORT = 65_535
# What is shorter turns up in any text; and then the gap would tell.
_LEAST_SECRET = 4

_ENCODE = "in a user or a password write @ as %40, : as %3A, / as %2F and ? as %3F"
_UNSET = "was a variable of the shell not set?"

_SYNONYMS = {"database": "dbname", "username": "user", "ssl": "sslmode"}
# JDBC's word, in the URLs of Heroku and others.
_SSL = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("disable", "allow", "require"),
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer", "require"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
    "load_balance_hosts": ("disable", "random"),
}
_NUMBERS = {
    *("connect_timeout", "tcp_user_timeout", "sslcompression", "sslsni", "gssdelegation"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
}
_TEXTS = {
    *("user", "password", "passfile", "host", "hostaddr", "port", "dbname", "service", "options", "application_name"),
    *("fallback_application_name", "client_encoding", "sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl"),
    *("sslcrldir", "requirepeer", "require_auth", "ssl_min_protocol_version", "ssl_max_protocol_version"),
    *("min_protocol_version", "max_protocol_version", "krbsrvname", "gsslib"),
    *("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope", "scram_client_key", "scram_server_key"),
}
_SECRETS = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key", "options")
OF_ONE_DRIVER: dict[str, dict[str, type[int] | type[float]]] = {
    "psycopg": {"prepare_threshold": int},
    "asyncpg": {
        "timeout": float,
        "command_timeout": float,
        "statement_cache_size": int,
        "prepared_statement_cache_size": int,
        "max_cached_statement_lifetime": int,
        "max_cacheable_statement_size": int,
    },
}
"""What SQLAlchemy's users say in a URL to one driver alone, which wants numbers."""
_KNOWN = _TEXTS | _NUMBERS | _CHOICES.keys() | {name for own in OF_ONE_DRIVER.values() for name in own}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a database is and how to get in; neither ``repr`` nor ``str`` tell anything secret.

    Attributes:
        driver: ``psycopg`` or ``asyncpg``.
        said: What the URL says, in libpq's words; hosts and their ports as lists with commas.
    """

    driver: str
    said: Mapping[str, str] = field(repr=False)

    @classmethod
    def read(cls, given: str | URL | None) -> Self:
        """Read a URL; ``postgres://`` and ``postgresql://`` leave the choice of the driver to us.

        Raises:
            MigrationError: There is none, it can't be understood, or names a driver that isn't installed.
        """
        if isinstance(given, URL):
            scheme = _SCHEME.match(f"{given.drivername}://")
            said = dict(_of_url(given))
        else:
            text = bare(given or "")
            if not text:
                raise MigrationError(f"no database given: {HOW_TO_SET}")
            scheme = _SCHEME.match(text)
            said = dict(_of_text(text[scheme.end() :])) if scheme else {}
        if not scheme or scheme[1] not in {None, *DRIVERS}:
            raise MigrationError(
                f"saga-store needs PostgreSQL over {' or '.join(DRIVERS)}, and the database's URL doesn't begin with "
                f"postgresql://, postgresql+psycopg:// or postgresql+asyncpg://: {HOW_TO_SET}"
            )
        installed = [name for name in DRIVERS if importlib.util.find_spec(name)]
        driver = scheme[1] or next(iter(installed), DRIVERS[0])
        if driver not in installed:
            raise MigrationError(f"the driver {driver} isn't installed: pip install saga-store[{driver}]")
        address = cls(driver, said)
        address.check()
        return address

    @property
    def hosts(self) -> list[str]:
        given = self.said.get("host") or self.said.get("hostaddr")
        return given.split(",") if given else []

    @property
    def ports(self) -> list[int | None]:
        """The port of each host, or of the default one; None where it is the default."""
        given = self.said.get("port", "").split(",")
        for port in given:
            if port and not (port.isdecimal() and 0 < int(port) <= _LAST_PORT):
                raise unreadable(f"its port isn't a number from 1 to {_LAST_PORT}: {_ENCODE}; or {_UNSET}")
        ports = [int(port) if port else None for port in given]
        places = len(self.hosts) or 1
        if len(ports) not in {1, places}:
            raise unreadable(
                f"it has {places} hosts and {len(ports)} ports: give each host its own, or all of them one"
            )
        return ports if len(ports) == places else ports * places

    def check(self) -> None:
        """Raise MigrationError for what a driver would refuse in a message that shows it."""
        for name, value in self.said.items():
            of_driver = OF_ONE_DRIVER[self.driver].get(name)
            if not of_driver and name not in _TEXTS | _NUMBERS | _CHOICES.keys():
                raise unreadable(f"{self.driver} has no {name}: take it out, or name the other driver")
            if name in _CHOICES and value not in _CHOICES[name]:
                raise unreadable(f"{name} has to be one of {', '.join(_CHOICES[name])}; {_UNSET}")
            if of_driver or name in _NUMBERS:
                _check_number(name, value, of_driver or int)
        places = len(self.ports)
        if (self.hosts and not all(self.hosts)) or len(self.hosts or [""]) != places:
            raise unreadable(f"one of its hosts is empty; {_UNSET}")
        for host in self.hosts:
            if not host.startswith("/") and not _HOST.fullmatch(host):
                raise unreadable(f"its host isn't a name, an address or the path of a socket: {_ENCODE}; or {_UNSET}")

    def hide(self, text: str) -> str:
        """Return somebody else's text, such as a driver's, in one line and without what is secret here."""
        secrets = {self.said.get(name, "") for name in _SECRETS}
        secrets.update(re.findall(r"=(\S+)", self.said.get("options", "")))
        secrets -= {self.said.get("user", ""), self.said.get("dbname", "")}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= _LEAST_SECRET:
                text = text.replace(secret, "***")
        return " ".join(text.split())

    def __str__(self) -> str:
        said = self.said.get
        if service := said("service"):
            return f"service {service}, over {self.driver}"
        pairs = zip(self.hosts, self.ports, strict=False)
        places = ", ".join(host if port is None else f"{host}:{port}" for host, port in pairs)
        user = f" as {said('user')}" if said("user") else ""
        where = f"{said('dbname', 'the default database')} at {places or 'the default host'}{user}"
        return " ".join(f"{where}, over {self.driver}".split())


def unreadable(why: str) -> MigrationError:
    return MigrationError(f"the database's URL can't be read: {why}")


def bare(text: str) -> str:
    """Drop what a file or a shell has left around a value: blanks, the end of the line, a pair of quotes."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].strip()
    return text


def _of_url(url: URL) -> Iterable[tuple[str, str]]:
    """Yield what SQLAlchemy has made of a URL; the checks find out where that was mistaken."""
    if "@" in (url.database or ""):
        raise unreadable(
            "its database's name has an @, as if a part of the password had got there: give it as text, and "
            f"percent-encoded; {_ENCODE}"
        )
    parts = {"user": url.username, "password": url.password, "host": url.host, "port": url.port, "dbname": url.database}
    yield from ((name, str(value)) for name, value in parts.items() if value is not None and str(value))
    yield from _of_query((name, value) for name, values in url.normalized_query.items() for value in values)


def _of_text(rest: str) -> Iterable[tuple[str, str]]:
    """Yield what stands behind the scheme."""
    if _CONTROLS.search(rest):
        raise unreadable(
            "there is a line break or another control character in it: take that out, or percent-encode it"
        )
    rest, _, query = rest.partition("?")
    login, at, rest = _split_login(rest)
    places, _, database = rest.partition("/")
    if at:
        user, _, password = login.partition(":")
        if not user:
            raise unreadable(f"its user is empty; {_UNSET}")
        yield from [("user", _decoded(user))]
        yield from [("password", _decoded(password))] if password else []
    yield from _of_places([_split_place(place) for place in places.split(",")])
    yield from [("dbname", _decoded(database))] if database else []
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    if not all(name and equals for name, equals, _ in pairs):
        raise unreadable(f"behind its ? not everything is name=value: {_ENCODE}")
    yield from _of_query((_decoded(name), _decoded(value.replace("+", " "))) for name, _, value in pairs)


def _split_login(rest: str) -> tuple[str, str, str]:
    """Split off user and password where libpq does, or where SQLAlchemy does, for which a password may hold a /."""
    places, _, path = rest.partition("/")
    if "@" not in path:
        login, at, _ = places.rpartition("@")
        return login, at, rest.removeprefix(login + at)
    behind_colon = places.partition(":")[2]
    # With a number there it may as well be a host with its port.
    if "@" in places or not behind_colon or behind_colon.isdecimal():
        raise unreadable(f"where user and password end in it isn't clear: {_ENCODE}")
    return rest.rpartition("@")


def _split_place(place: str) -> tuple[str, str]:
    found = _PLACE.fullmatch(place)
    if not found:
        raise unreadable(f"its host isn't a name or an address (of version 6: in [ ]): {_ENCODE}")
    return _decoded(found[1].strip("[]")), _decoded(found[2] or "")


def _of_places(places: list[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    for name, values in (("host", [host for host, _ in places]), ("port", [port for _, port in places])):
        if any(values):
            yield name, ",".join(values)


def _of_query(pairs: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    hosts: list[str] = []
    for number, (name, value) in enumerate(pairs, 1):
        known = _SYNONYMS.get(name, name)
        if known not in _KNOWN:
            raise unreadable(
                f"what parameter {number} behind its ? means isn't known: correct its name, or take it out; {_ENCODE}"
            )
        if not value:
            raise unreadable(f"its parameter {name} is empty; {_UNSET}")
        if known == "host":
            hosts += value.split(",")
        else:
            yield known, _SSL.get(value, value) if name == "ssl" else value
    # SQLAlchemy's ?host=a:1&host=b:2 has both in one, as libpq's authority has.
    yield from _of_places([_split_host(host) for host in hosts])


def _split_host(host: str) -> tuple[str, str]:
    whole = host.startswith("/") or (host.count(":") > 1 and not host.startswith("["))
    return (host, "") if whole else _split_place(host)


def _decoded(text: str) -> str:
    try:
        decoded = unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise unreadable("what is percent-encoded in it isn't UTF-8") from None
    if "\0" in decoded:
        raise unreadable("there is a NUL in it, which PostgreSQL can't have")
    return decoded


def _check_number(name: str, value: str, kind: type[int] | type[float]) -> None:
    try:
        kind(value)
    except ValueError:
        raise unreadable(f"{name} has to be a number; {_UNSET}") from None
