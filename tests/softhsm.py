# SPDX-License-Identifier: Apache-2.0
"""A real SoftHSM2 token for the tests: a folder, a PIN file and a key that cannot be extracted.

One configuration a process, since the module reads it once; each test makes tokens of its own in it.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from openkcm.roots.base import ANSWER_SECONDS
from openkcm.roots.pkcs11 import softhsm
from openkcm.roots.pkcs11.keys import AES, create_token_key
from openkcm.roots.pkcs11.modules import module_at
from openkcm.roots.pkcs11.uri import PKCS11URI

_numbers = itertools.count(1)


def find_module() -> str:
    """The module's path; without SoftHSM2 the tests that need it fail and say what to install."""
    return softhsm.find_module() or pytest.fail("SoftHSM2 is not installed: apt-get install softhsm2")


@dataclass
class Token:
    """A token with one root key; ``folder`` is where all tokens are, ``place`` where this one is."""

    module: str
    folder: Path
    label: str
    pin: str = field(repr=False)
    pin_file: Path
    uri: str = ""
    place: Path = Path()

    def add_key(self, label: str, key_id: bytes, kind: str = AES) -> str:
        """Make another key; its root URI."""
        return create_token_key(self.module, self.label, f"file:{self.pin_file}", label, key_id, kind=kind)

    def remove_key(self, label: str) -> None:
        """Destroy a key, in a session beside the one that roots use."""
        from pkcs11 import Attribute

        uri = PKCS11URI(token=self.label)

        def destroy(session: Any) -> None:
            for found in list(session.get_objects({Attribute.LABEL: label})):
                found.destroy()

        module_at(self.module).use(
            f"file:{self.pin_file}",
            lambda module, pin, started: module.write(uri, pin, destroy),
            ANSWER_SECONDS,
        )


@pytest.fixture(scope="session")
def softhsm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Point SoftHSM2 at a folder of the tests."""
    folder = tmp_path_factory.mktemp("softhsm")
    os.environ[softhsm.CONFIGURATION_VARIABLE] = str(softhsm.configure(folder))
    return folder


@pytest.fixture
def token(softhsm_folder: Path) -> Iterator[Token]:
    """A fresh token with a non-extractable AES-256 key; it goes away with the test."""
    module = find_module()
    made = softhsm.init_token(softhsm_folder, f"test-{next(_numbers)}")
    # The module in this process listed its tokens before; let it look again.
    module_at(module).forget_tokens()
    token = Token(
        module,
        softhsm_folder,
        made.label,
        made.pin_file.read_text(),
        made.pin_file,
        place=made.folder,
    )
    token.uri = token.add_key("root", b"\x01")
    yield token
    shutil.rmtree(token.place, ignore_errors=True)
    module_at(module).forget_tokens()
