"""Where a saga lives among shards, and what each shard records of its place; no I/O.

The hash is CRC-32, as of gzip and PNG, of the id's 16 bytes in network order. docs/scale.md specifies it for others.
"""

import zlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from uuid import UUID

from saga_store.errors import ShardingError

HASH = "crc32"
"""The name under which shards record how ids were spread over them."""
MOST_SHARDS = 1000


def shard_index(saga_id: UUID, count: int) -> int:
    """Return in which of ``count`` shards a saga lives, from 0 on."""
    return zlib.crc32(saga_id.bytes) % count


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What the database of a shard records.

    Attributes:
        cluster: Which shards belong together.
        index: Which of them it is, from 0 on.
        count: How many they are.
        hash: How ids are spread over them.
    """

    cluster: UUID
    index: int
    count: int
    hash: str = HASH

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"


@dataclass(frozen=True, slots=True)
class ShardState:
    """What a storage says of itself before it is used as a shard.

    Attributes:
        record: What its database records; None if it never was a shard.
        is_empty: Whether it has no saga at all.
        database: Equal for two storages that have the same tables.
    """

    record: ShardRecord | None
    is_empty: bool
    database: Hashable


def check_states(states: Mapping[int, ShardState], count: int, *, is_known: bool) -> None:
    """Refuse storages that aren't the shards that their places in the list say.

    Args:
        states: As far as they could be asked, by their places.
        count: How many storages there are in the list.
        is_known: Whether they were seen to be shards before, all of them.

    Raises:
        ShardingError: Something doesn't match.
    """
    seen: dict[Hashable, int] = {}
    for index, state in states.items():
        if (other := seen.setdefault(state.database, index)) != index:
            raise ShardingError(f"storages {other} and {index} are the same database and schema; give each shard once")
    records = {index: state.record for index, state in states.items() if state.record is not None}
    if records:
        _check_records(records, count)
    # Only among shards that have no saga may one be new: else it stands where another one has been.
    is_new = not is_known and all(state.is_empty for state in states.values())
    for index, state in states.items():
        if records and state.record is None and not is_new:
            first = next(iter(records))
            raise ShardingError(
                f"storage {index} records nothing, and is no shard of those that storage {first} belongs to: it is "
                f"{'an empty database in the place of one' if state.is_empty else 'a database with sagas of its own'}; "
                f"find shard {index} of {count}, or restore it"
            )


def _check_records(records: Mapping[int, ShardRecord], count: int) -> None:
    _check_kin(records)
    _check_count(records, count)
    places: dict[int, int] = {}
    for index, record in records.items():
        if (other := places.setdefault(record.index, index)) != index:
            raise ShardingError(
                f"storages {other} and {index} both are {record}: one is a copy of the other; give the one that is in "
                "use, and the shard that is missing"
            )
    for index, record in records.items():
        if record.index != index:
            raise ShardingError(
                f"storage {index} is {record}: the list is in another order than it was; give each shard at its place, "
                "counted from 0"
            )


def _check_kin(records: Mapping[int, ShardRecord]) -> None:
    first, one = next(iter(records.items()))
    for index, record in records.items():
        if record.hash != HASH:
            raise ShardingError(
                f"storage {index} was sharded by the hash {record.hash!r}, and this release knows {HASH!r} only; use "
                "the release that made it"
            )
        if record.cluster != one.cluster:
            raise ShardingError(
                f"storage {index} is {record} of other shards (cluster {record.cluster}) than storage {first} (cluster "
                f"{one.cluster}); give only shards that belong together"
            )


def _check_count(records: Mapping[int, ShardRecord], count: int) -> None:
    for index, record in records.items():
        if record.count > count:
            present = {found.index for found in records.values()}
            absent = ", ".join(str(number) for number in range(record.count) if number not in present)
            raise ShardingError(
                f"{count} storages were given, and storage {index} is {record}: missing is shard {absent}; give all "
                f"{record.count}, in order"
            )
        if record.count < count:
            raise ShardingError(
                f"{count} storages were given, and storage {index} is {record}: the number of shards was chosen once "
                f"and can't be changed; give those {record.count}, or move the sagas as docs/scale.md tells"
            )
