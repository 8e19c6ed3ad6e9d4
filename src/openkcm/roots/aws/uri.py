# SPDX-License-Identifier: Apache-2.0
"""``aws-kms://ARN`` URIs.

Invariant: strict. The ARN names one key for ever: an alias, which can be pointed at another key, is refused. Nothing in
the URI is a secret; AWS does not treat an external id as one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ...errors import RootMisconfigured

SCHEME: Final = "aws-kms://"
EXAMPLE: Final = (
    "aws-kms://arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    "[?role=arn:aws:iam::111122223333:role/NAME[&external-id=ID]]"
)

# Every partition but "aws" is told by how its regions' names begin.
_PREFIXES: Final = {
    "aws-cn": "cn-",
    "aws-us-gov": "us-gov-",
    "aws-eusc": "eusc-",
    "aws-iso": "us-iso-",
    "aws-iso-b": "us-isob-",
    "aws-iso-e": "eu-isoe-",
    "aws-iso-f": "us-isof-",
}
_KEY_ARN: Final = re.compile(
    r"arn:(?P<partition>aws(?:-[a-z]+)*):kms:(?P<region>[a-z]{2,8}(?:-[a-z]+)+-[0-9]{1,2}):(?P<account>[0-9]{12}):"
    r"key/(?P<key>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32})",
    re.ASCII,
)
_ALIAS: Final = re.compile(r"(?:arn:aws[a-z-]*:kms:[^:/?]*:[0-9]*:)?alias/", re.ASCII)
_ROLE_ARN: Final = re.compile(
    r"arn:(?P<partition>aws(?:-[a-z]+)*):iam::(?P<account>[0-9]{12}):role/(?:[\x21-\x7e]+/)?[\w+=,.@-]{1,64}",
    re.ASCII,
)
_EXTERNAL_ID: Final = re.compile(r"[\w+=,.@:/-]{2,1224}", re.ASCII)
_VALUE: Final = re.compile(r"(?:[\w+=,.@:/~-]|%[0-9A-Fa-f]{2})+", re.ASCII)


@dataclass(frozen=True, slots=True)
class AWSURI:
    """A parsed URI; ``role`` and ``external_id`` are None where they are not given."""

    partition: str
    region: str
    account: str
    key: str
    role: str | None = None
    external_id: str | None = None

    @property
    def arn(self) -> str:
        """The key's ARN."""
        return f"arn:{self.partition}:kms:{self.region}:{self.account}:key/{self.key}"

    @property
    def multi_region(self) -> bool:
        """Whether the key can have replicas with the same material in other regions."""
        return self.key.startswith("mrk-")

    def __str__(self) -> str:
        """The canonical URI; parsing it gives the same again."""
        query = [
            f"{name}={quote(value, safe='+=,.@:/-')}"
            for name, value in (("role", self.role), ("external-id", self.external_id))
            if value is not None
        ]
        return SCHEME + self.arn + ("?" + "&".join(query) if query else "")


def parse_aws_uri(uri: str) -> AWSURI:
    """Parse a URI.

    Raises:
        RootMisconfigured: malformed, an alias, or a region or role of another partition than the key's.
    """
    if not uri.startswith(SCHEME):
        raise RootMisconfigured(f"an AWS KMS root is {EXAMPLE}")
    arn, mark, query = uri.removeprefix(SCHEME).partition("?")
    if _ALIAS.match(arn):
        raise RootMisconfigured(
            "an alias can be pointed at another key, so a root is the key's own ARN; find it with: "
            "aws kms describe-key --key-id ALIAS --query KeyMetadata.Arn"
        )
    found = _KEY_ARN.fullmatch(arn)
    if found is None or (mark and not query):
        raise RootMisconfigured(f"an AWS KMS root is {EXAMPLE}")
    partition, region = found["partition"], found["region"]
    if partition_of(region) != partition:
        raise RootMisconfigured(f"the ARN's region {region} is not in its partition {partition}; check both")
    given = _parameters(query)
    role, external_id = given.get("role"), given.get("external-id")
    if role is not None:
        _check_role(role, partition)
    if external_id is not None and (role is None or not _EXTERNAL_ID.fullmatch(external_id)):
        raise RootMisconfigured(
            "external-id= goes with role= and is 2 to 1224 characters of A-Z a-z 0-9 _ + = , . @ : / -"
        )
    return AWSURI(partition, region, found["account"], found["key"], role, external_id)


def partition_of(region: str) -> str:
    """The partition that a region is in."""
    for partition, prefix in _PREFIXES.items():
        if region.startswith(prefix):
            return partition
    return "aws"


def _check_role(role: str, partition: str) -> None:
    found = _ROLE_ARN.fullmatch(role)
    if found is None:
        raise RootMisconfigured("role= is a role's ARN: arn:aws:iam::111122223333:role/NAME")
    if found["partition"] != partition:
        raise RootMisconfigured(
            "role= names a role of another partition than the key's; no role reaches across"
        )


def _parameters(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in query.split("&") if query else []:
        name, equals, value = piece.partition("=")
        if name not in ("role", "external-id") or not equals or name in found:
            raise RootMisconfigured(
                "an AWS KMS root's URI takes role= and external-id= once each, and nothing else; "
                "credentials, profile and endpoint come from the AWS configuration (AWS_PROFILE, AWS_ENDPOINT_URL_KMS)"
            )
        if not _VALUE.fullmatch(value):
            raise RootMisconfigured(f"the root URI's {name}= is empty, or holds characters to write as %XX")
        try:
            found[name] = unquote_to_bytes(value).decode("ascii")
        except UnicodeDecodeError:
            raise RootMisconfigured(f"the root URI's {name}= holds characters that no ARN has") from None
    return found
