# SPDX-License-Identifier: Apache-2.0
"""Every kind of root there is, each with its customer's levers, for the one suite that runs over all of them.

Invariant: a lever that a provider does not have is left out of its ``Offer``, by name, and not skipped in a test.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from openkcm.errors import (
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootThrottled,
    RootUnavailable,
)
from openkcm.roots import open_root
from openkcm.testing import FakeKey, FakeProvider
from openkcm.testing.aws import AWSKMS
from openkcm.testing.azure import AzureKeyVault
from openkcm.testing.gcp import GCPKMS
from openkcm.testing.openbao import OpenBao
from openkcm.testing.softhsm import AES, AES_WRAP, RSA, SoftHSM

Lever = Callable[[Any], object]


class LocalKey(FakeKey):
    """A file; its customer can rename it away."""

    def disable(self) -> None:
        open_root(self.uri).switch_off()  # type: ignore[attr-defined]
        super().disable()

    def enable(self) -> None:
        open_root(self.uri).switch_on()  # type: ignore[attr-defined]
        super().enable()

    def lie(self) -> None:
        """Another key in the same place: what comes back is not what was wrapped, here by not coming back."""
        path = Path(self.uri.removeprefix("local:"))
        path.rename(path.with_suffix(".kept"))
        open_root(self.uri, create=True)

    def heal(self) -> None:
        path = Path(self.uri.removeprefix("local:"))
        if path.with_suffix(".kept").exists():
            path.with_suffix(".kept").rename(path)
        super().heal()


class LocalFiles(FakeProvider):
    """Files in a folder."""

    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="openkcm-local-"))

    def stop(self) -> None:
        shutil.rmtree(self.folder)

    def settings(self) -> Mapping[str, str]:
        return {}

    def make_key(self, name: str) -> FakeKey:
        return LocalKey(name, open_root(f"local:{self.folder / name}", create=True).uri)


@dataclass(frozen=True)
class Offer:
    """A provider: how it is made, how a key is, and which levers it has with what a root then raises."""

    provider: Callable[[], FakeProvider]
    no: Mapping[str, type[OpenKCMError]]
    """Levers that take the key away, and come back with ``enable`` and ``allow``."""
    final: Mapping[str, type[OpenKCMError]]
    """Levers that take it away for good."""
    silence: Mapping[str, type[OpenKCMError]]
    """Faults of the network and the provider: no answer, or "too many requests"."""
    make_key: Callable[[Any, str], Any] = lambda provider, name: provider.make_key(name)
    permissions: tuple[str, ...] | None = None
    """The single permissions to wrap and to unwrap, if they can be withheld one by one."""
    versions: bool = True
    deterministic: bool = False
    """The mechanism gives the same ciphertext each time (AES key wrap)."""
    development: bool = False


_NO: Final = {"disable": RootDisabled, "deny": RootDenied, "delete": RootDestroyed}
_FINAL: Final = {"destroy": RootDestroyed}
_SILENCE: Final = {"black_hole": RootUnavailable, "throttle": RootThrottled, "fail": RootUnavailable}
_HSM_NO: Final = {"disable": RootDenied, "deny": RootDenied, "delete": RootDestroyed}
_HSM_SILENCE: Final = {"unplug": RootUnavailable, **_SILENCE}


def _hsm(kind: str, permissions: tuple[str, ...] | None, **more: Any) -> Offer:
    return Offer(
        SoftHSM,
        _HSM_NO,
        _FINAL,
        _HSM_SILENCE,
        lambda provider, name: provider.make_key(name, kind=kind),
        permissions,
        versions=False,
        **more,
    )


OFFERS: Final[Mapping[str, Offer]] = {
    "local": Offer(LocalFiles, {"disable": RootDisabled}, {}, {}, versions=False, development=True),
    "pkcs11-gcm": _hsm(AES, ("CKA_ENCRYPT", "CKA_DECRYPT")),
    "pkcs11-kwp": _hsm(AES_WRAP, ("CKA_WRAP", "CKA_UNWRAP"), deterministic=True),
    "pkcs11-oaep": _hsm(RSA, None),
    "aws-kms": Offer(AWSKMS, _NO, _FINAL, _SILENCE, permissions=AWSKMS.permissions),
    "azure-kms": Offer(AzureKeyVault, _NO, _FINAL, _SILENCE, permissions=AzureKeyVault().permissions),
    "azure-kms-hsm": Offer(
        AzureKeyVault,
        _NO,
        _FINAL,
        _SILENCE,
        lambda provider, name: provider.make_hsm_key(name),
        permissions=None,
        deterministic=True,
    ),
    "gcp-kms": Offer(GCPKMS, _NO, _FINAL, _SILENCE, permissions=GCPKMS.permissions),
    # Transit knows no pending deletion: what is deleted is gone.
    "bao-transit": Offer(
        OpenBao,
        {"disable": RootDisabled, "deny": RootDenied},
        {"delete": RootDestroyed, "destroy": RootDestroyed},
        _SILENCE,
        permissions=OpenBao.permissions,
    ),
}


def levers(which: str) -> list[tuple[str, str]]:
    """Pairs of an offer's name and one of its levers, of the kind ``no``, ``final`` or ``silence``."""
    pairs = [(name, lever) for name, offer in OFFERS.items() for lever in getattr(offer, which)]
    assert pairs
    return pairs


def pull(key: Any, lever: str) -> None:
    """Pull a lever by its name."""
    getattr(key, lever)()


def give_back(key: Any) -> None:
    """Take back whatever was pulled."""
    if hasattr(key, "plug_in"):
        key.plug_in()
    key.heal()
    key.allow()
    key.enable()


@contextmanager
def started(name: str) -> Iterator[FakeProvider]:
    """An offer's provider, running."""
    with OFFERS[name].provider() as provider:
        yield provider


__all__ = ["OFFERS", "Offer", "give_back", "levers", "pull", "started"]
