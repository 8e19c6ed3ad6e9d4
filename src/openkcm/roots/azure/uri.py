# SPDX-License-Identifier: Apache-2.0
"""``azure-kms:`` URIs, and which hosts are Azure's.

Invariant: a URI has one spelling, and ``parse(str(parse(uri))) == parse(uri)``. A token is only ever asked for the
one audience that belongs to the URI's host: a known suffix of Azure's, or a host that the operator named together
with its audience. No other host is spoken to.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

from ...errors import RootMisconfigured

HOSTS_VARIABLE: Final = "OPENKCM_AZURE_HOSTS"
"""Further hosts, by name: ``HOST[:PORT]=AUDIENCE`` separated by commas, each with what its tokens are for."""

SUFFIXES: Final = (
    "vault.azure.net",
    "vault.azure.cn",
    "vault.usgovcloudapi.net",
    "managedhsm.azure.net",
    "managedhsm.azure.cn",
    "managedhsm.usgovcloudapi.net",
)
"""Azure's own, in its public, Chinese and United States government clouds; the token's audience is the same name."""

_URI: Final = re.compile(
    r"azure-kms://([0-9A-Za-z.:-]+)/keys/([0-9A-Za-z-]{1,127})(?:/([0-9a-f]{32}))?(?:\?tenant=([0-9A-Fa-f-]+))?",
    re.ASCII,
)
_LABEL: Final = r"[0-9a-z](?:[0-9a-z-]*[0-9a-z])?"
_HOST: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*(?::[1-9][0-9]{{0,4}})?", re.ASCII)
_AUDIENCE: Final = re.compile(rf"https://({_LABEL}(?:\.{_LABEL})*(?::[1-9][0-9]{{0,4}})?)", re.ASCII)
_TENANT: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_MANAGED_HSM: Final = "managedhsm."


@dataclass(frozen=True, slots=True)
class AzureURI:
    """The parts of a root's URI; ``version`` is None for the newest, ``tenant`` is None for our own.

    A vault lies in its customer's tenant. An application of ours that customers add to theirs may log in there too, but
    does so only where ``tenant`` says so.
    """

    host: str
    name: str
    version: str | None = None
    tenant: str | None = None

    def __str__(self) -> str:
        version = f"/{self.version}" if self.version else ""
        tenant = f"?tenant={self.tenant}" if self.tenant else ""
        return f"azure-kms://{self.host}/keys/{self.name}{version}{tenant}"


@dataclass(frozen=True, slots=True)
class Service:
    """What answers at a host.

    ``audience`` is what its tokens are for. ``verifiable`` says that the host lies below its audience's domain, which
    is what the SDK checks of a challenge; where it does not, the operator's pairing of the two is checked instead.
    """

    managed_hsm: bool
    audience: str
    verifiable: bool
    resource: str | None
    """The vault's or the HSM's name in Azure, None where the host does not tell."""


def parse_azure_uri(uri: str) -> AzureURI:
    """Read a URI.

    Raises:
        RootMisconfigured: it is not one; the message shows a right one, and nothing of the wrong one.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise RootMisconfigured(
            "an Azure root is azure-kms://VAULT.vault.azure.net/keys/NAME, with /VERSION (32 hexadecimal digits, lower"
            " case) to pin a version and ?tenant=ID for a vault of another Entra tenant; copy the key's identifier"
        )
    host, tenant = match[1].lower(), match[4].lower() if match[4] else None
    if _HOST.fullmatch(host) is None or int(host.partition(":")[2] or 1) > 65535:
        raise RootMisconfigured("the Azure root's URI names no host such as VAULT.vault.azure.net")
    if tenant is not None and _TENANT.fullmatch(tenant) is None:
        raise RootMisconfigured(
            "tenant= in the Azure root's URI is an Entra tenant's ID, 8-4-4-4-12 hexadecimal digits"
        )
    return AzureURI(host, match[2], match[3], tenant)


def find_service(host: str) -> Service:
    """Say what answers at a host.

    Raises:
        RootMisconfigured: neither Azure's nor named in ``OPENKCM_AZURE_HOSTS``.
    """
    for suffix in SUFFIXES:
        label, found, rest = host.partition(f".{suffix}")
        if found and not rest and "." not in label:
            return Service(suffix.startswith(_MANAGED_HSM), f"https://{suffix}", True, label)
    named = _named_hosts()
    if host not in named:
        raise RootMisconfigured(
            f"{host} is no host of Azure Key Vault ({', '.join(f'*.{suffix}' for suffix in SUFFIXES)}); if you mean"
            f" it, name it in {HOSTS_VARIABLE} as HOST[:PORT]=AUDIENCE, such as"
            f" {host}=https://vault.azure.net: tokens for that audience are then sent to it"
        )
    audience = named[host]
    domain = audience.removeprefix("https://")
    return Service(domain.startswith(_MANAGED_HSM), audience, host.endswith(f".{domain}"), None)


def _named_hosts() -> dict[str, str]:
    named = {}
    for entry in filter(None, os.environ.get(HOSTS_VARIABLE, "").replace(" ", "").split(",")):
        host, _, audience = entry.lower().partition("=")
        if _HOST.fullmatch(host) is None or _AUDIENCE.fullmatch(audience) is None:
            raise RootMisconfigured(
                f"{HOSTS_VARIABLE} holds HOST[:PORT]=AUDIENCE entries, separated by commas, such as"
                " vault.example:8443=https://vault.azure.net"
            )
        named[host] = audience
    return named
