# SPDX-License-Identifier: Apache-2.0
"""``bao-transit:`` URIs: ``bao-transit://HOST[:PORT]/MOUNT/KEY``, and what is not secret about the way to the key.

Invariant: strict and canonical. A part that is unknown, repeated, empty or malformed is refused; so is whatever could
be a secret, since URIs are stored, logged and typed on command lines. TLS is left out only when asked for by name, and
only towards this machine itself.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ...errors import RootMisconfigured

SCHEME: Final = "bao-transit://"
DEFAULT_PORT: Final = 8200
MAX_URI_CHARACTERS: Final = 2048
LOGINS: Final = ("token", "approle", "kubernetes")
PARAMETERS: Final = ("login", "auth", "role", "namespace", "credentials", "ca", "tls")

_EXAMPLE: Final = "a Transit root looks like bao-transit://bao.example:8200/transit/KEY"
_HOST: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?", re.ASCII)
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_NAME: Final = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?", re.ASCII)
_PLACE: Final = re.compile(
    r"[A-Za-z0-9_](?:[A-Za-z0-9_.~-]{0,126})(?:/[A-Za-z0-9_][A-Za-z0-9_.~-]{0,126}){0,15}"
)
_CREDENTIALS: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?", re.ASCII)
_VALUE: Final = re.compile(r"(?:[A-Za-z0-9._~!$'()*+,:@/-]|%[0-9A-Fa-f]{2})+", re.ASCII)
_SECRETS: Final = {"token", "role-id", "role_id", "secret-id", "secret_id", "jwt", "password"}


@dataclass(frozen=True, slots=True)
class BaoURI:
    """A parsed URI.

    ``mount`` and ``key`` name the key, ``auth`` is where the login method is mounted, ``role`` the Kubernetes role,
    ``credentials`` chooses among this process's credentials, ``ca`` is a file or folder of certificate authorities.
    """

    host: str
    mount: str
    key: str
    port: int = DEFAULT_PORT
    login: str = "token"
    auth: str | None = None
    role: str | None = None
    namespace: str | None = None
    credentials: str | None = None
    ca: str | None = None
    tls: bool = True

    def __str__(self) -> str:
        """The canonical URI; parsing it gives the same again."""
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        given = (
            ("login", None if self.login == "token" else self.login),
            ("auth", self.auth),
            ("role", self.role),
            ("namespace", self.namespace),
            ("credentials", self.credentials),
            ("ca", self.ca),
            ("tls", None if self.tls else "off"),
        )
        query = "&".join(f"{name}={quote(value, safe='/')}" for name, value in given if value is not None)
        return f"{SCHEME}{self._host}{port}/{self.mount}/{self.key}" + (f"?{query}" if query else "")

    @property
    def address(self) -> str:
        """The server's URL, as ``BAO_ADDR`` would have it."""
        return f"http{'s' if self.tls else ''}://{self._host}:{self.port}"

    @property
    def login_mount(self) -> str:
        """Where the login method is mounted, below ``auth/``."""
        return self.auth or self.login

    @property
    def _host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def parse_bao_uri(uri: str) -> BaoURI:
    """Parse a URI.

    Raises:
        RootMisconfigured: malformed, incomplete, or something in it could be a secret.
    """
    if not uri.startswith(SCHEME) or len(uri) > MAX_URI_CHARACTERS:
        raise RootMisconfigured(_EXAMPLE)
    place, question, query = uri.removeprefix(SCHEME).partition("?")
    authority, _, path = place.partition("/")
    if "@" in authority:
        raise RootMisconfigured("a name or password does not belong in a Transit root's URI; " + _EXAMPLE)
    host, port = _host_and_port(authority)
    mount, _, key = path.rpartition("/")
    if not is_place(mount) or not is_name(key):
        raise RootMisconfigured(
            f"the URI names no Transit mount and key, or holds characters they cannot; {_EXAMPLE}"
        )
    if question and not query:
        raise RootMisconfigured(f"the URI ends in a question mark; {_EXAMPLE}")
    return _checked(BaoURI(host, mount, key, port), _parameters(query))


def is_name(text: str) -> bool:
    """Whether this can be the name of a Transit key or of a role."""
    return _NAME.fullmatch(text) is not None


def is_place(text: str) -> bool:
    """Whether this can be where something is mounted, or a namespace."""
    return _PLACE.fullmatch(text) is not None


def is_this_machine(host: str) -> bool:
    """Whether a host is this machine itself, so that nothing sent to it crosses a network."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host_and_port(authority: str) -> tuple[str, int]:
    wrong = RootMisconfigured(f"the URI's host or port is malformed; {_EXAMPLE}")
    if authority.startswith("["):
        inner, bracket, rest = authority[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        try:
            host = ipaddress.IPv6Address(inner).compressed if bracket and "%" not in inner else ""
        except ValueError:
            host = ""
        if not host or (rest and colon != ":"):
            raise wrong
    else:
        host, colon, port = authority.lower().partition(":")
        if not authority.isascii() or not _HOST.fullmatch(host) or not _is_host(host):
            raise wrong
    if not colon:
        return host, DEFAULT_PORT
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise wrong
    return host, int(port)


def _is_host(host: str) -> bool:
    labels = host.split(".")
    if not all(0 < len(label) <= 63 and label[0] != "-" and label[-1] != "-" for label in labels):
        return False
    if not labels[-1].isdigit():
        return True
    try:  # a name whose last label is a number is an IPv4 address to every resolver
        return str(ipaddress.IPv4Address(host)) == host
    except ValueError:
        return False


def _parameters(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in query.split("&") if query else []:
        name, equals, value = piece.partition("=")
        if name.lower() in _SECRETS:
            raise RootMisconfigured(
                "a token, role id, secret id or JWT does not belong in a URI, which is stored and logged; put it in "
                "a file that OPENKCM_BAO_TOKEN_FILE, OPENKCM_BAO_ROLE_ID_FILE, OPENKCM_BAO_SECRET_ID_FILE or "
                "OPENKCM_BAO_JWT_FILE names"
            )
        if name not in PARAMETERS or not equals or name in found:
            raise RootMisconfigured(
                f"the Transit URI has an unknown or repeated parameter; known are {', '.join(PARAMETERS)}"
            )
        if not _VALUE.fullmatch(value):
            raise RootMisconfigured(f"the Transit URI's {name} is empty, or holds characters to write as %XX")
        found[name] = _text(name, value)
    return found


def _text(name: str, value: str) -> str:
    try:
        text = unquote_to_bytes(value).decode()
    except UnicodeDecodeError:
        raise RootMisconfigured(f"the Transit URI's {name} is not UTF-8") from None
    if not text.isprintable():
        raise RootMisconfigured(f"the Transit URI's {name} holds characters that cannot be printed")
    return text


def _checked(place: BaoURI, given: dict[str, str]) -> BaoURI:
    login, auth, role = given.get("login", "token"), given.get("auth"), given.get("role")
    if login not in LOGINS:
        raise RootMisconfigured(f"the Transit URI's login is one of {', '.join(LOGINS)}")
    if auth is not None and (login == "token" or not is_place(auth)):
        raise RootMisconfigured(
            "auth is where the login method is mounted, for login=approle or login=kubernetes"
        )
    if (role is None) is (login == "kubernetes") or (role is not None and not is_name(role)):
        raise RootMisconfigured(
            "role names the Kubernetes role: login=kubernetes needs it, other logins have none"
        )
    namespace, credentials, ca = given.get("namespace"), given.get("credentials"), given.get("ca")
    if namespace is not None and not is_place(namespace):
        raise RootMisconfigured("namespace is a name, or names with slashes between them")
    if credentials is not None and not _CREDENTIALS.fullmatch(credentials):
        raise RootMisconfigured("credentials is a name of lower-case letters, digits and hyphens")
    if ca is not None and not ca.startswith("/"):
        raise RootMisconfigured("ca is the absolute path of a file or folder of certificate authorities")
    tls = given.get("tls")
    if tls is not None and (tls != "off" or not is_this_machine(place.host) or ca is not None):
        raise RootMisconfigured(
            "tls=off is for a server or agent on this machine (127.0.0.1, ::1 or localhost); elsewhere the token and "
            "the keys would cross the network in plaintext"
        )
    return BaoURI(
        host=place.host,
        mount=place.mount,
        key=place.key,
        port=place.port,
        login=login,
        auth=None if auth == login else auth,
        role=role,
        namespace=namespace,
        credentials=credentials,
        ca=ca,
        tls=tls is None,
    )
