# SPDX-License-Identifier: Apache-2.0
"""Decrypting records, with the keys at hand: only what this vault encrypted opens, alone or in a batch."""

from __future__ import annotations

from collections.abc import Iterator

from vault import handle, originals

from golden import CONTEXTS, PLAINTEXTS
from openkcm.errors import DecryptError, FormatError, KeyDestroyed, OpenKCMError


def seeds() -> Iterator[bytes]:
    yield from originals(stream=False)


def check(data: bytes) -> None:
    case = originals(stream=False).get(data, {"error": "DecryptError", "context": "mapping"})
    context = CONTEXTS[case["context"]]
    try:
        opened = handle().decrypt(data, context=context)
    except (DecryptError, FormatError) as error:
        assert "opens" not in case
        outcome: OpenKCMError = error
    except KeyDestroyed as error:
        # Of a shredded key no more than its id is looked at.
        outcome = error
    else:
        assert opened == PLAINTEXTS[case["opens"]]
        (again,) = handle().decrypt_many([data], context=context)
        assert again == opened
        return
    first, second = handle().decrypt_many([data, data], context=context, errors="return")
    assert type(first) is type(second) is type(outcome), (first, second, outcome)
