# SPDX-License-Identifier: Apache-2.0
"""``gcp-kms:`` URIs: a Cloud KMS key's resource name, and which of Google's endpoints serves it.

Invariant: parsing is strict and canonical, so ``str(parse_gcp_uri(uri)) == uri``. A URI comes from a customer and our
login is sent where it points: it can name Google's own endpoints for the key's location, and no other host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ...errors import RootMisconfigured

SCHEME: Final = "gcp-kms"

_PROJECT: Final = r"(?:[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?:)?[a-z][a-z0-9-]{4,28}[a-z0-9]|[1-9][0-9]{0,19}"
_NAME: Final = re.compile(
    rf"projects/(?P<project>{_PROJECT})/locations/(?P<location>[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?)"
    r"/keyRings/(?P<ring>[A-Za-z0-9_-]{1,63})/cryptoKeys/(?P<key>[A-Za-z0-9_-]{1,63})",
    re.ASCII,
)
_EXAMPLE: Final = "gcp-kms://projects/PROJECT/locations/LOCATION/keyRings/RING/cryptoKeys/KEY"
_VERSION: Final = re.compile(r".*/cryptoKeyVersions/[^/]*", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class GCPKeyURI:
    """A symmetric key in Cloud KMS; ``endpoint`` is a host of Google's, None for the global one."""

    project: str
    location: str
    ring: str
    key: str
    endpoint: str | None = None

    @property
    def name(self) -> str:
        """The key's resource name."""
        return f"projects/{self.project}/locations/{self.location}/keyRings/{self.ring}/cryptoKeys/{self.key}"

    def __str__(self) -> str:
        return f"{SCHEME}://{self.name}{f'?endpoint={self.endpoint}' if self.endpoint else ''}"


def endpoints(location: str) -> tuple[str, ...]:
    """Google's own hosts for a location's keys; the global location has none beside the global host."""
    if location == "global":
        return ()
    return (
        f"cloudkms.{location}.rep.googleapis.com",
        f"cloudkms.{location}.p.rep.googleapis.com",
        f"{location}-cloudkms.googleapis.com",
    )


def parse_gcp_uri(uri: str) -> GCPKeyURI:
    """Read a ``gcp-kms:`` URI.

    Raises:
        RootMisconfigured: anything but the canonical form.
    """
    rest, mark, query = uri.partition("?")
    name = rest.removeprefix(f"{SCHEME}://")
    if name == rest:
        raise RootMisconfigured(f"a Cloud KMS root is {_EXAMPLE}")
    if _VERSION.fullmatch(name):
        raise RootMisconfigured(
            "name the key without /cryptoKeyVersions/...: Cloud KMS finds the version that decrypts by itself, and "
            "encrypts with the primary one, so that the customer can rotate the key"
        )
    match = _NAME.fullmatch(name)
    if match is None:
        raise RootMisconfigured(
            f"a Cloud KMS root is {_EXAMPLE}, the key's resource name in its own spelling"
        )
    return GCPKeyURI(**match.groupdict(), endpoint=_endpoint(query, match["location"]) if mark else None)


def _endpoint(query: str, location: str) -> str:
    host = query.removeprefix("endpoint=")
    if host == query or host not in endpoints(location):
        known = " or ".join(f"?endpoint={host}" for host in endpoints(location)) or "none for a global key"
        raise RootMisconfigured(
            f"what may follow a Cloud KMS key's name is {known}; "
            "hosts that are not Google's are named by OPENKCM_GCP_ENDPOINT"
        )
    return host
