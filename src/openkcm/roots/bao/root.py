# SPDX-License-Identifier: Apache-2.0
"""``bao-transit:`` a root key in the Transit engine of OpenBao or HashiCorp Vault.

Invariant: the key never leaves the server, and no request of ours can make one. The context is bound twice: by
Transit's ``associated_data``, and by its digest inside what is wrapped (``binding``), since Vault before 1.13 ignores
``associated_data`` without a word.

A wrapped blob is ``01 || key version 4 || what Transit made``: nonce, ciphertext and tag of ``vault:vN:...``, without
the base64, so that one ciphertext has one spelling (Transit itself takes ``v1``, ``v01`` and ``v0`` for the same).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import shlex
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ...context import encode_context
from ...errors import DecryptError, OpenKCMError, RootDenied, RootDestroyed, RootMisconfigured
from ...limits import NONCE_BYTES, TAG_BYTES
from ..base import ANSWER_SECONDS, CONNECT_SECONDS, Grant
from ..binding import bind, unbind
from .answers import ANSWERS, Answer, is_invalid_token, known, malformed, refusal
from .login import Login, Token
from .uri import BaoURI, is_name, is_place, parse_bao_uri

if TYPE_CHECKING:
    from .http import BoundedAdapter

__all__ = ["ANSWERS", "BaoRoot", "make_blob", "open_bao", "parse_blob"]

FORMAT: Final = 1
VERSION_BYTES: Final = 4
MAX_SEALED_BYTES: Final = 4096
MAX_VERSION: Final = 10**9
LONGEST_NONCE_BYTES: Final = 24
"""Of xchacha20-poly1305; the other types take 12 bytes."""

NO_KEY_TYPE: Final = "must-exist"
"""No type of key. Who may make keys makes one by encrypting with a key that is not there; of no known type it fails."""

CALL_SECONDS: Final = CONNECT_SECONDS + ANSWER_SECONDS
"""For one wrap or unwrap with whatever logging in it needs."""

_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]{1,8192}={0,2})", re.ASCII)
_TYPES: Final = {"aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"}
_NOTHING: Final = f"vault:v1:{base64.b64encode(bytes(NONCE_BYTES + TAG_BYTES)).decode()}"

_generation = 0


class BaoRoot:
    """A key of the Transit engine."""

    development = False

    def __init__(self, parsed: BaoURI) -> None:
        self._parsed = parsed
        self._places: dict[int, _Place] = {}
        self.uri = str(parsed)

    def __repr__(self) -> str:
        return f"<BaoRoot {self.uri}>"

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt with the key, binding the context."""
        if len(sealed) > MAX_SEALED_BYTES:
            raise RootMisconfigured(f"a root wraps at most {MAX_SEALED_BYTES} bytes")
        plaintext = bind(sealed, context)
        try:
            data = self._ask("encrypt", context, plaintext=_encoded(plaintext), type=NO_KEY_TYPE)
        except DecryptError:
            raise malformed("a request to encrypt is answered as one to decrypt") from None
        version, ciphertext = _parse_ciphertext(data.get("ciphertext"))
        added = len(ciphertext) - len(plaintext) - TAG_BYTES
        if not NONCE_BYTES <= added <= LONGEST_NONCE_BYTES:
            raise malformed("a ciphertext of the wrong length")
        return make_blob(version, ciphertext)

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return what ``wrap`` was given; DecryptError for anything else."""
        version, ciphertext = parse_blob(wrapped)
        data = self._ask("decrypt", context, ciphertext=f"vault:v{version}:{_encoded(ciphertext)}")
        return unbind(_decoded(data.get("plaintext")), context)

    def warnings(self) -> list[str]:
        """What is weak about the way to the key, the token and the key itself, as far as we may know it."""
        found = []
        if not self._parsed.tls:
            found.append(
                f"{self.uri} is reached in plaintext (tls=off): whoever is on this machine can read our token"
            )
        try:
            return found + self._weaknesses()
        except OpenKCMError:
            return found

    def grant(self, identity: str | None = None) -> Grant:
        """Say what to allow: a policy, and the command that gives it to us.

        Args:
            identity: ``auth/MOUNT/role/NAME``, or the role's name alone, or what a token is called; if not given, the
                server is asked who we are.

        Raises:
            RootMisconfigured: no identity was given and none could be found, or it is not of that form.
        """
        others: tuple[str, ...] | None = None
        if identity is None:
            identity, others = self._who_we_are()
        elif self._parsed.login != "token" and is_name(identity):
            identity = f"auth/{self._parsed.login_mount}/role/{identity}"
        if not is_place(identity):
            raise RootMisconfigured("an identity is auth/MOUNT/role/NAME, or the name of a role or token")
        return _grant(self._parsed, identity, others)

    def close(self) -> None:
        """Close the connections and forget the token; a later use opens anew."""
        place = self._places.pop(_generation, None)
        if place is not None:
            place.close()

    # ---- inside --------------------------------------------------------------------------------------

    def _place(self) -> _Place:
        """What this process has open. A parent's connections are neither used nor closed: their locks may be held."""
        return self._places.get(_generation) or self._places.setdefault(_generation, _Place(self._parsed))

    def _ask(self, operation: str, context: Mapping[str, str], **parameters: str) -> Mapping[str, Any]:
        """Have Transit encrypt or decrypt; returns the answer's data."""
        parameters["associated_data"] = _encoded(encode_context(context))
        place, deadline = self._place(), time.monotonic() + CALL_SECONDS
        token = place.login.current(deadline)
        answer = place.transit(operation, token, deadline, parameters)
        if answer.status == 403 and (other := _another_token(place, token, answer, deadline)) is not None:
            answer = place.transit(operation, other, deadline, parameters)
            token = other
        if answer.status == 200:
            return answer.part("data")
        error = refusal(answer, _permission(self._parsed, operation))
        if operation == "encrypt" and isinstance(error, RootDenied) and _is_gone(place, token, deadline):
            error = known("encryption key not found")
        raise error

    def _who_we_are(self) -> tuple[str, tuple[str, ...] | None]:
        """Our identity in the server's words, and the policies it has already, None if that is not known."""
        place, deadline = self._place(), time.monotonic() + CALL_SECONDS
        try:
            answer = place.login.look_up(place.login.current(deadline), deadline)
            if answer.status != 200:
                raise refusal(answer, "read on auth/token/lookup-self")
            return _identity(answer.part("data"))
        except OpenKCMError as error:
            if self._parsed.role is not None:
                return f"auth/{self._parsed.login_mount}/role/{self._parsed.role}", None
            raise RootMisconfigured(f"say who we are: the server could not be asked ({error})") from error

    def _weaknesses(self) -> list[str]:
        place, deadline = self._place(), time.monotonic() + CALL_SECONDS
        token = place.login.current(deadline)
        answers = (place.login.look_up(token, deadline), place.read_key(token, deadline))
        told, key = (answer.part("data") if answer.status == 200 else {} for answer in answers)
        found = []
        if isinstance(told.get("policies"), list) and "root" in told["policies"]:
            found.append(
                "our token is a root token: it may do anything to the server; use one with our policy alone"
            )
        seconds = told.get("ttl")
        if (
            self._parsed.login == "token"
            and isinstance(seconds, int)
            and seconds > 0
            and not told.get("renewable")
        ):
            found.append(
                f"our token ends in {seconds // 3600} hours and cannot be renewed; see that a new one follows"
            )
        if key.get("exportable") is True or key.get("allow_plaintext_backup") is True:
            found.append("the root key can leave the server (exportable or allow_plaintext_backup)")
        if key.get("deletion_allowed") is True:
            found.append("the root key can be deleted at once (deletion_allowed)")
        if isinstance(key.get("type"), str) and key["type"] not in _TYPES:
            found.append("the root key is weaker than aes256-gcm96")
        return found


def open_bao(uri: str, *, create: bool = False) -> BaoRoot:
    """Open a ``bao-transit:`` root; the server is asked when the key is first used. ``create`` has no effect."""
    return BaoRoot(parse_bao_uri(uri))


def make_blob(version: int, ciphertext: bytes) -> bytes:
    """A wrapped blob of its parts."""
    return bytes((FORMAT,)) + bytes.fromhex(f"{version:08x}") + ciphertext


def parse_blob(wrapped: bytes) -> tuple[int, bytes]:
    """Split a wrapped blob: (key version, ciphertext); DecryptError for anything malformed."""
    head = 1 + VERSION_BYTES
    least, most = NONCE_BYTES + TAG_BYTES, LONGEST_NONCE_BYTES + TAG_BYTES + 2 * MAX_SEALED_BYTES
    if not head + least <= len(wrapped) <= head + most or wrapped[0] != FORMAT:
        raise DecryptError
    version = int(wrapped[1:head].hex(), 16)
    if not 0 < version < MAX_VERSION:
        raise DecryptError
    return version, bytes(wrapped[head:])


class _Place:
    """One process's way to a server: its connections and its login."""

    def __init__(self, parsed: BaoURI) -> None:
        self._parsed = parsed
        self._session: Any = None
        self.login = Login(parsed, self.reach)

    def reach(self, token: str | None, deadline: float) -> BoundedAdapter:
        """A way to the server for one call."""
        try:
            from . import http
        except ImportError:
            raise RootMisconfigured("bao-transit: roots need the extra: pip install 'openkcm[bao]'") from None
        session = self._session
        if session is None:
            session = self._session = http.open_session(self._parsed)
        namespace = self._parsed.namespace or http.setting("NAMESPACE")
        return http.BoundedAdapter(session, self._parsed.address, namespace, token, deadline)

    def transit(self, operation: str, token: Token, deadline: float, parameters: Mapping[str, str]) -> Answer:
        """Have Transit encrypt or decrypt."""
        engine = self._engine(token, deadline)
        call = engine.encrypt_data if operation == "encrypt" else engine.decrypt_data
        answer: Answer = call(self._parsed.key, mount_point=self._parsed.mount, **parameters)
        return answer

    def read_key(self, token: Token, deadline: float) -> Answer:
        """Ask for the key's attributes, which takes a permission that a root does not need."""
        answer: Answer = self._engine(token, deadline).read_key(
            self._parsed.key, mount_point=self._parsed.mount
        )
        return answer

    def _engine(self, token: Token, deadline: float) -> Any:
        adapter = self.reach(token.value, deadline)
        from hvac.api.secrets_engines import Transit  # type: ignore[import-untyped]

        return Transit(adapter)

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def _another_token(place: _Place, token: Token, answer: Answer, deadline: float) -> Token | None:
    """Another token, if a 403 was about the old one; None if it was about what we may do.

    Raises:
        RootMisconfigured: the token is over, and there is no other.
    """
    try:
        told = answer if is_invalid_token(answer) else place.login.look_up(token, deadline)
        if not is_invalid_token(told):
            return place.login.exchanged(token, deadline)
    except OpenKCMError:
        return None  # the server said no; that it does not say why makes it no outage
    other = place.login.replaced(token, deadline)
    if other is None:
        raise known("invalid token")
    return other


def _is_gone(place: _Place, token: Token, deadline: float) -> bool:
    """Whether the key was deleted. Encrypting with it is then refused as making a key would be; decrypting tells."""
    try:
        told = place.transit("decrypt", token, deadline, {"ciphertext": _NOTHING})
    except OpenKCMError:
        return False
    return isinstance(refusal(told), RootDestroyed) if told.status != 200 else False


def _permission(parsed: BaoURI, operation: str) -> str:
    return f"update on {parsed.mount}/{operation}/{parsed.key}"


def _identity(data: Mapping[str, Any]) -> tuple[str, tuple[str, ...] | None]:
    """Who a token belongs to; nothing that a server makes up gets into what is pasted into a shell."""
    told, path, meta, name = (data.get(part) for part in ("policies", "path", "meta", "display_name"))
    policies = [each for each in told if isinstance(each, str)] if isinstance(told, list) else []
    # One that cannot be pasted is not left out of a list that replaces the role's.
    whole = isinstance(told, list) and len(policies) == len(told) and all(map(is_place, policies))
    others = tuple(each for each in policies if each not in ("default", "root")) if whole else None
    role = (meta.get("role_name") or meta.get("role")) if isinstance(meta, dict) else None
    if isinstance(role, str) and isinstance(path, str) and is_name(role) and path.endswith("/login"):
        return f"{path.removesuffix('/login')}/role/{role}", others
    if not isinstance(name, str) or not is_name(name):
        raise RootMisconfigured("the server knows our token by no name")
    return name, others


def _grant(parsed: BaoURI, identity: str, others: tuple[str, ...] | None) -> Grant:
    policy = f"openkcm-{parsed.mount.replace('/', '-')}-{parsed.key}".lower()
    rules = "\n".join(
        f'path "{parsed.mount}/{operation}/{parsed.key}" {{\n  capabilities = ["update"]\n}}'
        for operation in ("encrypt", "decrypt")
    )
    namespace = f" -namespace={shlex.quote(parsed.namespace)}" if parsed.namespace else ""
    if "/" in identity:
        note = (
            "" if others is not None else "# This replaces the role's policies: name those too that it has.\n"
        )
        policies = ",".join(dict.fromkeys((*(others or ()), policy)))
        bound = f"{note}bao write{namespace} {identity} token_policies={policies}"
    else:
        bound = (
            "# A token's policies are fixed when it is made: make this one, and give it to OpenKCM.\n"
            f"bao token create{namespace} -orphan -period=24h -display-name=openkcm -policy={policy}"
        )
    return Grant(
        form="policy and the commands that bind it (for Vault write vault for bao)",
        text=f"bao policy write{namespace} {policy} - <<'EOF'\n{rules}\nEOF\n{bound}\n",
        permissions=(_permission(parsed, "encrypt"), _permission(parsed, "decrypt")),
        identity=identity,
    )


def _parse_ciphertext(text: object) -> tuple[int, bytes]:
    found = _CIPHERTEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise malformed("no ciphertext")
    return int(found[1]), _decoded(found[2])


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decoded(text: object) -> bytes:
    """Base64 that has one spelling."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data or _encoded(data) != text:
        raise malformed("no base64")
    return data


def _after_fork_in_child() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_after_fork_in_child)
