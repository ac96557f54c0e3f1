"""Which Host a request may name: by DNS rebinding a page elsewhere could have a browser read what is here."""

import re
from collections.abc import Iterable

from saga_store.errors import InvalidSagaDataError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{1,5})?")


def host_of(header: str | None) -> str | None:
    """Return the host that a header names, without its port and in lower case; None if it names none."""
    found = _HOST.fullmatch(header or "")
    return (found["v6"] or found["name"]).lower().rstrip(".") if found else None


def valid_hosts(hosts: Iterable[str]) -> frozenset[str]:
    given = [hosts] if isinstance(hosts, str) else list(hosts)
    found = [host_of(f"[{host}]" if host.count(":") > 1 and "[" not in host else host) for host in given]
    for host, name in zip(given, found, strict=True):
        if name is None:
            raise InvalidSagaDataError("allowed_hosts", f"must be names or addresses of hosts, not {host!r:.60}")
    return frozenset(name for name in found if name)
