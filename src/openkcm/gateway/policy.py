# SPDX-License-Identifier: Apache-2.0
"""How long a data key serves, and how many wait ready."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import InvalidInput
from ..limits import MAX_KEYS_PER_CALL, MAX_RECORDS_PER_KEY


@dataclass(frozen=True, slots=True)
class DataKeyPolicy:
    """When a data key is replaced: after so many records, bytes or seconds, whichever comes first.

    The default is a data key for every record. A key never serves a record that would take it over a limit,
    except that a record larger than ``bytes`` gets a key of its own.

    Args:
        records: 1 to 2**32 (NIST SP 800-38D, section 8.3).
        bytes: plaintext bytes, or None for no limit.
        seconds: age, or None for no limit; the key is zeroed then, whether anybody encrypts or not.
    """

    records: int = 1
    bytes: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not 1 <= self.records <= MAX_RECORDS_PER_KEY:
            raise InvalidInput("a data key serves 1 to 2**32 records")
        if self.bytes is not None and self.bytes < 1:
            raise InvalidInput("a data key serves at least one byte")
        if self.seconds is not None and not self.seconds > 0:
            raise InvalidInput("a data key serves for more than no time")


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How many data keys are wrapped in advance for each service, so that a single call asks nobody.

    Args:
        keys: how many are made at a time, and the most that wait; 0 for none. Of a Core that is far away, half are
            made at a time, while the other half is used.
        seconds: after how long those left over are zeroed, whether anybody encrypts then or not.
    """

    keys: int = 256
    seconds: float = 60.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        if not 0 <= self.keys <= MAX_KEYS_PER_CALL:
            raise InvalidInput(f"a pool holds 0 to {MAX_KEYS_PER_CALL} keys")
        if not self.seconds > 0:
            raise InvalidInput("a pool keeps keys for more than no time")


def _check_numbers(policy: DataKeyPolicy | PoolPolicy) -> None:
    for each in fields(policy):
        value = getattr(policy, each.name)
        wanted = (int, float) if each.name == "seconds" else int
        if (value is not None or each.default is not None) and not isinstance(value, wanted):
            raise InvalidInput(f"{each.name} of a policy is a number, not {type(value).__name__}")
