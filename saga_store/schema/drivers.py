"""What each driver is told of an address: psycopg in libpq's own words, asyncpg in those that it has for them."""

import configparser
import os
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from saga_store.schema.settings import MigrationError
from saga_store.schema.urls import OF_ONE_DRIVER, Address

_DEFAULT_PORT = 5432
_WORDS = {
    "user": "user",
    "password": "password",
    "dbname": "database",
    "passfile": "passfile",
    "connect_timeout": "timeout",
    "target_session_attrs": "target_session_attrs",
    "krbsrvname": "krbsrvname",
    "gsslib": "gsslib",
}
# These it takes in a URL only.
_TLS = (
    *("sslmode", "sslcert", "sslkey", "sslpassword", "sslrootcert", "sslcrl"),
    *("ssl_min_protocol_version", "ssl_max_protocol_version"),
)
# What it does anyhow, or what is only advice to a socket.
_NEEDLESS = {
    *("client_encoding", "load_balance_hosts", "sslcompression", "sslsni", "gssdelegation", "tcp_user_timeout"),
    *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"),
}
_NEEDLESS_VALUES = {
    ("channel_binding", "disable"),
    ("channel_binding", "prefer"),
    ("gssencmode", "disable"),
    ("gssencmode", "prefer"),
    ("sslcertmode", "allow"),
    ("sslnegotiation", "postgres"),
}


def connect_arguments(address: Address) -> dict[str, Any]:
    """Return what SQLAlchemy's ``connect_args`` has to be.

    Raises:
        MigrationError: The driver has no word for something that was asked for.
    """
    if address.driver == "psycopg":
        # In a database that is SQL_ASCII psycopg would return bytes in place of text.
        return {"client_encoding": "utf8"} | dict(address.said) | _numbers(address)
    if "service" in address.said:
        address = replace(address, said=_service(address.said["service"]) | dict(address.said))
        address.check()
    return _for_asyncpg(address) | _numbers(address)


def _numbers(address: Address) -> dict[str, Any]:
    own = OF_ONE_DRIVER[address.driver]
    return {name: own[name](value) for name, value in address.said.items() if name in own}


def _for_asyncpg(address: Address) -> dict[str, Any]:
    said = {name: value for name, value in address.said.items() if name not in {"service", *OF_ONE_DRIVER["asyncpg"]}}
    arguments: dict[str, Any] = {word: said.pop(name) for name, word in _WORDS.items() if name in said}
    if "timeout" in arguments:
        arguments["timeout"] = int(arguments["timeout"]) or None  # libpq: 0 is no limit
    if address.hosts:
        del said["host" if "host" in said else "hostaddr"]
        arguments["host"] = address.hosts
    if "port" in said:
        del said["port"]
        arguments["port"] = [port or _DEFAULT_PORT for port in address.ports]
    settings = _settings(said)
    if settings:
        arguments["server_settings"] = settings
    if said.get("sslnegotiation") == "direct":
        del said["sslnegotiation"]
        arguments["direct_tls"] = True
    if said.get("sslrootcert") == "system":
        del said["sslrootcert"]
        said.pop("sslmode", None)  # libpq takes no other with it than verify-full
        arguments["ssl"] = ssl.create_default_context()
    if tls := {name: said.pop(name) for name in _TLS if name in said}:
        arguments["dsn"] = f"postgresql://?{urlencode(tls)}"
    for name, value in said.items():
        if name not in _NEEDLESS and (name, value) not in _NEEDLESS_VALUES:
            raise MigrationError(
                f"asyncpg has no word for {name} in the database's URL: take it out, or migrate with a "
                "postgresql+psycopg:// URL"
            )
    return arguments


def _settings(said: dict[str, str]) -> dict[str, str]:
    """Take out what libpq, too, only hands on to the server."""
    settings = {"application_name": said.pop("fallback_application_name", "")}
    settings |= {name: said.pop(name) for name in ("application_name", "options") if name in said}
    return {name: value for name, value in settings.items() if value}


def _service(name: str) -> dict[str, str]:
    """Read a service's section, as libpq does; asyncpg passes over one that isn't there."""
    files = [os.environ.get("PGSERVICEFILE") or Path("~/.pg_service.conf").expanduser()]
    if folder := os.environ.get("PGSYSCONFDIR"):
        files.append(Path(folder) / "pg_service.conf")
    for file in files:
        services = configparser.RawConfigParser(strict=False, delimiters=("=",))
        try:
            services.read(file)
        except (configparser.Error, UnicodeDecodeError):
            # Its message shows lines of the file.
            raise MigrationError(f"the file of services {str(file)!r} can't be read: it has a bad line") from None
        if services.has_section(name):
            return {key: value for key, value in services[name].items() if value}
    raise MigrationError(f"there is no service {name!r}: see PGSERVICEFILE, or give the database's URL in full")
