# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``pkcs11:`` roots on real tokens share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

from openkcm.roots import Root
from openkcm.roots.base import ANSWER_SECONDS
from openkcm.roots.pkcs11.modules import module_at
from openkcm.roots.pkcs11.pins import Pin
from openkcm.roots.pkcs11.uri import PKCS11URI
from softhsm import Token

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "eu", "version": "1"}
SEALED = bytes(range(72))
KEY = bytes(range(32))
NONCE = bytes(range(100, 112))
VECTOR = bytes.fromhex(
    "01016465666768696a6b6c6d6e6f"
    "481adc657dec5099366b55e3d66864f252d314199f79e565bfc8b653e7bebb57b4c862e36837bd23d5da5214d16fe4e0"
    "2b6aaad4147f771fc2c896edd3bc9bb548cd994d920e7d4280a6f018b993ee89cc8df87e46970ac9"
)
WRAPPED_VECTOR = bytes.fromhex(
    "0103"
    "a1e24237b0e201f8fb4d913f99a5357d833a5305a5ebbe2f6ca84e140914cf5bde79e1a466121ef12448416608e1483c"
    "453a77a55b3e15311ac171a4a74c6a7212ef564727a3981ebc4bd8c86e2176155e4029334875853ee5f97bbdf165c9a8"
    "3eef85a8fb4f6379e0545eebf6eb1478"
)


def use(root: Root) -> None:
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


def make(token: Token, label: str, key_id: int, **attributes: object) -> str:
    """Make an AES key on the token with attributes of one's own; its root URI."""
    import pkcs11 as binding

    uri = PKCS11URI(
        token=token.label,
        object=label,
        id=bytes((key_id,)),
        module_path=token.module,
        pin_source=f"file:{token.pin_file}",
    )
    template = {binding.Attribute[name]: value for name, value in attributes.items()}
    value = template.pop(binding.Attribute.VALUE, None)
    length = template.pop(binding.Attribute.VALUE_LEN, 32)

    def create(session: Any) -> None:
        if value is None:
            session.generate_key(
                binding.KeyType.AES, length * 8, label=label, id=uri.id, store=True, template=template
            )
        else:
            session.create_object(
                {
                    binding.Attribute.CLASS: binding.ObjectClass.SECRET_KEY,
                    binding.Attribute.KEY_TYPE: binding.KeyType.AES,
                    binding.Attribute.TOKEN: True,
                    binding.Attribute.PRIVATE: True,
                    binding.Attribute.LABEL: label,
                    binding.Attribute.ID: uri.id,
                    binding.Attribute.VALUE: value,
                    **template,
                }
            )

    run(token, lambda module, pin, started: module.write(uri, pin, create))
    return str(uri)


def run(token: Token, attempt: Callable[[Any, Pin | None, float], object]) -> None:
    module_at(token.module).use(f"file:{token.pin_file}", attempt, ANSWER_SECONDS)


def without_source(token: Token) -> str:
    return re.sub(r"&pin-source=.*", "", token.uri)


def at_a_terminal(*typed: str) -> Any:
    """Stand for a person at a terminal."""
    stdin = mock.Mock(closed=False, isatty=lambda: True)
    answers = mock.Mock(side_effect=typed)
    return mock.patch.multiple(
        "openkcm.roots.pkcs11.pins", sys=mock.Mock(stdin=stdin), getpass=mock.Mock(getpass=answers)
    )
