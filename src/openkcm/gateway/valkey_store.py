# SPDX-License-Identifier: Apache-2.0
"""Named data keys in Valkey or Redis, shared by any number of Gateways.

Invariant: each change is one atomic step of the server for each of its keys, the indexes included, and may be made
again without harm. What is acknowledged is as durable as the server makes it (``appendfsync``), which ``durability``
tells; a server that would evict keys is refused, since a lost key is lost data. No call takes longer than seconds, and
no connection is used by two processes.

What is in the database, all in one slot (the braces), so that a server in cluster mode takes it:

=============================  ==============================================================================
``{openkcm}:keystore``         version of the format, a colon, and the salt
``{openkcm}:SERVICE:keys``     a hash: data key id to record (subject 32, wrapped 72, version in 10 digits)
``{openkcm}:SERVICE:subjects`` a hash: subject to the id of the key that counts
``{openkcm}:SERVICE:ids``      the ids, in order, for ``scan``
``{openkcm}:buried``           tombstones, in order: service id (12) and data key id (16)
``{openkcm}:names``            a hash: service id to tenant, region and service of tombstones, spaces in between
=============================  ==============================================================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from valkey.exceptions import ResponseError, ValkeyError

from ..crypto import random_bytes
from ..errors import ConfigurationError, StoreUnavailable
from ..keys import Service
from ..limits import KEY_ID_BYTES, SERVICE_ID_BYTES, SUBJECT_HASH_BYTES, WRAPPED_KEY_BYTES
from .keystore import (
    DAMAGED,
    SALT_BYTES,
    VERSION,
    WHAT,
    WITHOUT_SALT,
    Buried,
    StoredKey,
    buried_of,
    checked,
    parts,
)
from .valkey_client import connect, store_error

T = TypeVar("T")

logger = logging.getLogger("openkcm")

_SALT_KEY: Final = b"{openkcm}:keystore"
_HEAD: Final = b"%d:" % VERSION
_VERSION_AT: Final = SUBJECT_HASH_BYTES + WRAPPED_KEY_BYTES
_VERSION_DIGITS: Final = 10
_RECORD_BYTES: Final = _VERSION_AT + _VERSION_DIGITS

_TOGETHER: Final = 1000
"""Keys in one step of the server, which serves nobody else meanwhile: some 2 ms."""

# KEYS: keys, subjects, ids, the salt's key. ARGV: the ids and the records, each packed, and the salt as it is kept.
# The subject comes last: what fails in between leaves a key that nobody finds, and not a name without a key.
# Gives subject, id and record of the key that counts, for each subject that had one.
_ADD: Final = f"""
if redis.call('GET', KEYS[4]) ~= ARGV[3] then return redis.error_reply('OPENKCM replaced') end
local counting = {{}}
for at = 0, #ARGV[1] / {KEY_ID_BYTES} - 1 do
  local id = string.sub(ARGV[1], at * {KEY_ID_BYTES} + 1, (at + 1) * {KEY_ID_BYTES})
  local record = string.sub(ARGV[2], at * {_RECORD_BYTES} + 1, (at + 1) * {_RECORD_BYTES})
  local subject = string.sub(record, 1, {SUBJECT_HASH_BYTES})
  local first = redis.call('HGET', KEYS[2], subject)
  if first then
    counting[#counting + 1] = subject
    counting[#counting + 1] = first
    counting[#counting + 1] = redis.call('HGET', KEYS[1], first)
  else
    redis.call('HSET', KEYS[1], id, record)
    redis.call('ZADD', KEYS[3], 0, id)
    redis.call('HSET', KEYS[2], subject, id)
  end
end
return counting
"""
_REWRAP: Final = f"""
for at = 0, #ARGV[1] / {KEY_ID_BYTES} - 1 do
  local id = string.sub(ARGV[1], at * {KEY_ID_BYTES} + 1, (at + 1) * {KEY_ID_BYTES})
  local record = string.sub(ARGV[2], at * {_RECORD_BYTES} + 1, (at + 1) * {_RECORD_BYTES})
  local old = redis.call('HGET', KEYS[1], id)
  local version = old and #old == #record and tonumber(string.sub(old, {_VERSION_AT + 1}))
  if version and version <= tonumber(string.sub(record, {_VERSION_AT + 1})) then
    redis.call('HSET', KEYS[1], id, record)
  end
end
"""
# A subject may have another key by now, which stays.
_REMOVE: Final = f"""
for at = 0, #ARGV[1] / {KEY_ID_BYTES} - 1 do
  local id = string.sub(ARGV[1], at * {KEY_ID_BYTES} + 1, (at + 1) * {KEY_ID_BYTES})
  local record = redis.call('HGET', KEYS[1], id)
  if record then
    local subject = string.sub(record, 1, {SUBJECT_HASH_BYTES})
    if redis.call('HGET', KEYS[2], subject) == id then redis.call('HDEL', KEYS[2], subject) end
  end
  redis.call('HDEL', KEYS[1], id)
  redis.call('ZREM', KEYS[3], id)
end
"""


# KEYS: those of _REMOVE, the tombstones, the names. ARGV: ids, nothing, service id, names.
_BURY: Final = f"""
redis.call('HSET', KEYS[5], ARGV[3], ARGV[4])
for at = 0, #ARGV[1] / {KEY_ID_BYTES} - 1 do
  redis.call('ZADD', KEYS[4], 0, ARGV[3] .. string.sub(ARGV[1], at * {KEY_ID_BYTES} + 1, (at + 1) * {KEY_ID_BYTES}))
end
{_REMOVE}
"""
_BURIED_KEY: Final = b"{openkcm}:buried"
_NAMES_KEY: Final = b"{openkcm}:names"


class ValkeyKeyStore:
    """A key store in one database of a Valkey or Redis server; the database may hold other things too.

    Args:
        url: ``valkey://[USER][:PASSWORD]@HOST[:PORT][/DATABASE]`` or ``redis://...``; ``valkeys://`` or ``rediss://``
            for TLS, verified to the host, with ``?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE`` where wanted.
        most: connections at a time; who finds none free waits.

    Raises:
        ConfigurationError: the server evicts keys when its memory is full.
        InvalidInput: the URL is of another form.
        StoreUnavailable: the server does not answer, refuses us, or holds something else.

    Attributes:
        durability: what happens to what was acknowledged when the server is killed: ``always`` (nothing is lost),
            ``everysec`` (up to two seconds of it), ``no`` (what the kernel has not written), ``none`` (all since the
            last snapshot), or ``unknown`` where the server does not say. It says nothing of the loss of the machine,
            nor of a failover to a replica.
    """

    def __init__(self, url: str, *, most: int = 8) -> None:
        self._make_client = connect(url, most)
        self._closed = False
        self._client: Any = self._make_client()
        try:
            self._run(_refuse_eviction)
            self.durability: str = self._run(_durability)
            self._salt = self._run(_salt)
        except BaseException:
            self.close()
            raise
        if self.durability != "always":
            logger.warning(
                "%s may lose keys that it acknowledged, and the data under them (appendfsync: %s); "
                "set appendonly yes and appendfsync always",
                WHAT,
                self.durability,
            )

    @property
    def salt(self) -> bytes:
        """32 random bytes, made with the store."""
        return self._salt

    def find_subjects(self, service_id: bytes, subjects: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by subject hash."""
        _, names, _ = _names(service_id)
        ids = [each for each in self._fetch(names, subjects) if each is not None]
        # What is removed in between is left out.
        return {key.subject: key for key in self._find(service_id, ids)}

    def find_ids(self, service_id: bytes, key_ids: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        """Keys by id."""
        return {key.key_id: key for key in self._find(service_id, key_ids)}

    def add(self, service_id: bytes, keys: Sequence[StoredKey]) -> Mapping[bytes, StoredKey]:
        """Add keys for subjects that have none; the key that now counts for each subject."""
        counting = {key.subject: key for key in keys}
        names = (*_names(service_id), _SALT_KEY)
        for answer in self._change(_ADD, names, _packed(keys), _HEAD + self._salt):
            for subject, key in zip(answer[::3], _keys(answer[1::3], answer[2::3]), strict=True):
                if subject != key.subject:
                    raise StoreUnavailable(DAMAGED, retryable=False)
                counting[subject] = key
        return counting

    def rewrap(self, service_id: bytes, keys: Iterable[StoredKey]) -> None:
        """Put newly wrapped bytes in place of the old ones, unless a newer version is there."""
        self._change(_REWRAP, _names(service_id), _packed([*keys]))

    def remove(self, service_id: bytes, key_ids: Iterable[bytes]) -> None:
        """Delete keys; their bytes stay in the server's log until it rewrites that, and in its backups."""
        packed = [(b"".join(part), b"") for part in parts([*key_ids], _TOGETHER)]
        self._change(_REMOVE, _names(service_id), packed)

    def bury(self, service: Service, key_ids: Sequence[bytes]) -> None:
        """As ``remove``, with a tombstone for each id."""
        packed = [(b"".join(part), b"") for part in parts([*key_ids], _TOGETHER)]
        keys = (*_names(service.service_id), _BURIED_KEY, _NAMES_KEY)
        names = f"{service.tenant} {service.region} {service.name}".encode()
        self._change(_BURY, keys, packed, service.service_id, names)

    def buried(self, service_id: bytes, key_ids: Sequence[bytes]) -> frozenset[bytes]:
        """Those of the ids that have a tombstone."""

        def look(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipeline:
                for key_id in key_ids:
                    # Not ZSCORE, which the rights of a store's user would have to be extended for.
                    place = b"[" + service_id + key_id
                    pipeline.zrangebylex(_BURIED_KEY, place, place)
                return _answers(pipeline)

        found = self._run(look) if key_ids else []
        return frozenset(each for each, places in zip(key_ids, found, strict=True) if places)

    def pending(self, after: bytes, limit: int) -> list[Buried]:
        """Tombstones in order."""
        places = self._run(_range(_BURIED_KEY, b"(" + after if after else b"-", limit))
        known = {place[:SERVICE_ID_BYTES]: b"" for place in places}
        for service_id, names in zip(known, self._fetch(_NAMES_KEY, [*known]), strict=True):
            known[service_id] = names or b""
        # Where the names are lost, no error of the server's is hidden: buried_of says that the store is damaged.
        return buried_of(
            (
                place[:SERVICE_ID_BYTES],
                place[SERVICE_ID_BYTES:],
                *known[place[:SERVICE_ID_BYTES]].decode("ascii", "replace").split(" "),
            )
            for place in places
        )

    def delivered(self, service_id: bytes, key_ids: Sequence[bytes]) -> None:
        """Drop tombstones; the names of their services stay."""
        places = [service_id + key_id for key_id in key_ids]
        for part in parts(places, _TOGETHER):
            self._run(_drop(part))

    def scan(self, service_id: bytes, after: bytes, limit: int) -> list[StoredKey]:
        """Keys in the order of their ids."""
        _, _, ids = _names(service_id)
        while True:
            start = b"(" + after if after else b"-"
            part = self._run(_range(ids, start, limit))
            found = self._find(service_id, part)
            # None but all removed in between: that is not the end of the list.
            if found or not part:
                return found
            after = part[-1]

    def count(self, service_id: bytes) -> int:
        """How many keys the service has."""
        return int(self._run(lambda client: client.hlen(_names(service_id)[0])))

    def forget(self) -> None:
        """In a forked child: leave the parent's connections alone."""
        # The driver closes what it inherited without a word to the server: it keeps in mind who opened it.
        self._client = self._make_client()

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self._client.connection_pool.disconnect()

    def __repr__(self) -> str:
        return f"<ValkeyKeyStore durability={self.durability}>"

    # ---- inside --------------------------------------------------------------------------------------

    def _fetch(self, name: bytes, fields: Sequence[bytes]) -> list[Any]:
        """The values of fields of a hash, None where there is none; one round trip."""

        def fetch(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipeline:
                for part in parts(fields, _TOGETHER):
                    pipeline.execute_command("HMGET", name, *part)
                return [value for answer in _answers(pipeline) for value in answer]

        return self._run(fetch) if fields else []

    def _find(self, service_id: bytes, key_ids: Sequence[bytes]) -> list[StoredKey]:
        records = self._fetch(_names(service_id)[0], key_ids)
        there = [at for at, record in enumerate(records) if record is not None]
        return _keys([key_ids[at] for at in there], [records[at] for at in there])

    def _change(
        self, script: str, names: Sequence[bytes], packed: Sequence[tuple[bytes, bytes]], *more: bytes
    ) -> list[Any]:
        """Run a script over packed keys, ``_TOGETHER`` at a time; one round trip."""

        def change(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipeline:
                for ids, records in packed:
                    # EVAL and not EVALSHA: a server that is restarted forgets its scripts.
                    pipeline.eval(script, len(names), *names, ids, records, *more)
                return _answers(pipeline)

        return self._run(change) if packed else []

    def _run(self, use: Callable[[Any], T]) -> T:
        if self._closed:
            raise StoreUnavailable(f"{WHAT} was closed", retryable=False)
        try:
            return use(self._client)
        except (ValkeyError, OSError) as error:
            raise store_error(error) from None


def _range(name: bytes, start: bytes, limit: int) -> Callable[[Any], Sequence[bytes]]:
    return lambda client: client.zrangebylex(name, start, b"+", 0, limit)


def _drop(places: Sequence[bytes]) -> Callable[[Any], object]:
    return lambda client: client.zrem(_BURIED_KEY, *places)


def _answers(pipeline: Any) -> list[Any]:
    """The answers to what a pipeline holds; the driver's own raising puts the commands into the message."""
    answers = list(pipeline.execute(raise_on_error=False))
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


# ---- the database's bytes ---------------------------------------------------------------------------------------


def _names(service_id: bytes) -> tuple[bytes, bytes, bytes]:
    """Where a service's keys, subjects and ids are."""
    base = b"{openkcm}:" + service_id.hex().encode()
    return base + b":keys", base + b":subjects", base + b":ids"


def _packed(keys: Sequence[StoredKey]) -> list[tuple[bytes, bytes]]:
    """Ids and records of keys, ``_TOGETHER`` at a time: two arguments cost less than thousands."""
    return [
        (
            b"".join([key.key_id for key in part]),
            b"".join([b"%b%b%010d" % (key.subject, key.wrapped, key.version) for key in part]),
        )
        for part in parts(keys, _TOGETHER)
    ]


def _keys(ids: Sequence[Any], records: Sequence[Any]) -> list[StoredKey]:
    if any(type(record) is not bytes or len(record) != _RECORD_BYTES for record in records):
        raise StoreUnavailable(DAMAGED, retryable=False)
    return checked(
        [
            (
                key_id,
                record[:SUBJECT_HASH_BYTES],
                # int() takes spaces, signs and underscores as well.
                int(digits) if (digits := record[_VERSION_AT:]).isdigit() else None,
                record[SUBJECT_HASH_BYTES:_VERSION_AT],
            )
            for key_id, record in zip(ids, records, strict=True)
        ]
    )


# ---- the server's ways ------------------------------------------------------------------------------------------


def _setting(client: Any, name: str) -> str | None:
    """A setting of the server; None where it does not say, as many hosted ones do not."""
    try:
        found = client.config_get(name)
    except ResponseError:
        return None
    value = found.get(name)
    return None if value is None else str(value)


def _info(client: Any, section: str) -> Mapping[str, Any]:
    try:
        found = client.info(section)
    except ResponseError:
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_eviction(client: Any) -> None:
    policy = _setting(client, "maxmemory-policy") or _info(client, "memory").get("maxmemory_policy")
    if policy is None:
        logger.warning(
            "%s does not say whether it evicts keys; see to it that maxmemory-policy is noeviction", WHAT
        )
    elif policy != "noeviction":
        raise ConfigurationError(
            f"{WHAT} evicts keys when its memory is full (maxmemory-policy {str(policy)[:30]}), and with them the data "
            "under them; set maxmemory-policy noeviction, or use another server"
        )


def _durability(client: Any) -> str:
    written = _setting(client, "appendonly")
    if written is None:
        enabled = _info(client, "persistence").get("aof_enabled")
        written = {1: "yes", 0: "no"}.get(enabled) if isinstance(enabled, int) else None
    if written == "no":
        return "none"
    synced = _setting(client, "appendfsync")
    return synced if written == "yes" and synced in ("always", "everysec", "no") else "unknown"


def _salt(client: Any) -> bytes:
    """The store's salt, made where the database has none of our keys."""
    kept = client.get(_SALT_KEY)
    if kept is None:
        # Looked for first, and only where there is none: under a new salt nobody would find the subjects there are.
        if any(True for _ in client.scan_iter(match="{openkcm}:*", count=1000)):
            kept = client.get(_SALT_KEY)  # made by another Gateway since, perhaps
            if kept is None:
                raise StoreUnavailable(WITHOUT_SALT, retryable=False)
        else:
            client.set(_SALT_KEY, _HEAD + random_bytes(SALT_BYTES), nx=True)
            kept = client.get(_SALT_KEY)
    head, colon, salt = bytes(kept or b"").partition(b":")
    if head.isdigit() and colon and head + colon != _HEAD:
        raise StoreUnavailable(f"{WHAT} has format {int(head[:9])}; use a newer OpenKCM", retryable=False)
    if head + colon != _HEAD or len(salt) != SALT_BYTES:
        raise StoreUnavailable(DAMAGED, retryable=False)
    return salt
