# SPDX-License-Identifier: Apache-2.0
"""How a key on a token wraps: AES-GCM, AES key wrap with padding, or RSA-OAEP.

Invariant: the mechanism is chosen at the wrap, by the key's type, what the key may be used for and what the token
offers, and stands in the blob; an unwrap uses that one and no other. A mechanism that binds no context carries it
inside (``binding``). There is no SHA-1 and no unauthenticated mode, whatever a token offers.

========  =======================================  ====================================================
the blob  mechanism                                what follows the two bytes
========  =======================================  ====================================================
``01 01`` CKM_AES_GCM                              nonce 12, ciphertext, tag 16; the context as associated data
``01 02`` CKM_AES_KEY_WRAP_KWP (RFC 5649)          the wrapped key, 8 bytes longer than it
``01 03`` CKM_AES_KEY_WRAP_PAD                     as the token does it: RFC 5649, or RFC 3394 over PKCS#7 padding
``01 04`` CKM_RSA_PKCS_OAEP, SHA-256, MGF1-SHA256  the ciphertext, as long as the modulus
========  =======================================  ====================================================

PKCS#11 v2.40 left open which of the two the padded AES key wrap is, and tokens do either, hence the two numbers.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ...context import encode_context
from ...errors import DecryptError, InvalidInput, RootDenied, RootMisconfigured
from ...limits import NONCE_BYTES, TAG_BYTES
from ..binding import DIGEST_BYTES, bind, unbind
from .answers import Answer, ask
from .oaep import unpad_oaep

FORMAT: Final = 1
AES_GCM: Final = 1
AES_KWP: Final = 2
AES_KEY_WRAP_PAD: Final = 3
RSA_OAEP_SHA256: Final = 4

MAX_BLOB_BYTES: Final = 4096
RSA_BITS: Final = (2048, 16384)
STRONG_RSA_BITS: Final = 3072
"""Below it a root is warned of: 2048 bits are worth 112 (NIST SP 800-57)."""

_USES: Final = ("encrypt", "decrypt")
_WRAP_USES: Final = ("wrap_key", "unwrap_key")
_CHECK: Final = b"OpenKCM?"  # a multiple of 8 bytes, for key wrap
_CHECK_CONTEXT: Final = {"openkcm": "check"}


@dataclass(eq=False, slots=True)
class Key:
    """A key on a token as the binding gives it, and what the token offers: mechanism to flags."""

    handle: Any
    session: Any
    offered: Mapping[int, Any]
    is_private: bool
    is_bare: bool = False
    """An RSA key whose token knows no OAEP with SHA-256, and was asked for the bare operation instead."""

    def may(self, *uses: str) -> bool:
        """Whether its attributes allow these uses: the binding gives it only the methods that they allow."""
        return all(hasattr(self.handle, use) for use in uses)

    def offers(self, mechanism: int, *functions: str) -> bool:
        """Whether the token offers a mechanism for these functions, and the key may be used with it."""
        from pkcs11 import MechanismFlag

        flags = self.offered.get(mechanism, 0)
        allowed = self._allowed()
        return all(flags & MechanismFlag[function] for function in functions) and (
            not allowed or mechanism in allowed
        )

    def _allowed(self) -> list[int]:
        """The key's CKA_ALLOWED_MECHANISMS; none means all."""
        from pkcs11 import Attribute

        try:
            return list(ask(self.handle.__getitem__, Attribute.ALLOWED_MECHANISMS))
        except Answer:
            return []  # most tokens have no such attribute


class Wrapping(Protocol):
    """One way to wrap; ``number`` is the blob's second byte, ``name`` the mechanism's."""

    @property
    def number(self) -> int: ...

    @property
    def name(self) -> str: ...

    def fits(self, key: Key) -> bool:
        """Whether the key and its token can wrap and unwrap so."""

    def is_well_formed(self, body: bytes) -> bool:
        """Whether a blob's body can be one of these, before anybody is asked."""

    def wrap(self, key: Key, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Wrap on the token; the blob's body."""

    def unwrap(self, key: Key, body: bytes, context: Mapping[str, str]) -> bytes:
        """Unwrap on the token; Answer for the module's refusal, DecryptError for another context."""


class _Gcm:
    number = AES_GCM
    name = "CKM_AES_GCM"

    def fits(self, key: Key) -> bool:
        from pkcs11 import Mechanism

        return (
            not key.is_private
            and key.may("encrypt", "decrypt")
            and key.offers(Mechanism.AES_GCM, "ENCRYPT", "DECRYPT")
        )

    def is_well_formed(self, body: bytes) -> bool:
        return len(body) >= NONCE_BYTES + TAG_BYTES

    def wrap(self, key: Key, sealed: bytes, context: Mapping[str, str]) -> bytes:
        # 96 random bits: a root wraps a handful of keys in its life.
        nonce = os.urandom(NONCE_BYTES)
        _need(key, "encrypt")
        ciphertext = ask(key.handle.encrypt, bytes(sealed), **_gcm(nonce, context))
        if len(ciphertext) != len(sealed) + TAG_BYTES:
            raise RootMisconfigured(
                "the token makes nonces of its own for CKM_AES_GCM, as some do in FIPS mode; use an AES key that may "
                "wrap and unwrap instead (CKA_WRAP, CKA_UNWRAP), or an RSA key"
            )
        return nonce + bytes(ciphertext)

    def unwrap(self, key: Key, body: bytes, context: Mapping[str, str]) -> bytes:
        nonce, ciphertext = body[:NONCE_BYTES], body[NONCE_BYTES:]
        _need(key, "decrypt")
        return bytes(ask(key.handle.decrypt, ciphertext, **_gcm(nonce, context)))


@dataclass(frozen=True)
class _KeyWrap:
    """AES key wrap, by C_Encrypt where the token allows it, else of a session object by C_WrapKey: the same bytes."""

    number: int
    name: str

    def fits(self, key: Key) -> bool:
        return not key.is_private and (self._encrypts(key) or self._wraps(key))

    def _encrypts(self, key: Key) -> bool:
        return key.may("encrypt", "decrypt") and key.offers(self._mechanism(), "ENCRYPT", "DECRYPT")

    def _wraps(self, key: Key) -> bool:
        return key.may("wrap_key", "unwrap_key") and key.offers(self._mechanism(), "WRAP", "UNWRAP")

    def _mechanism(self) -> Any:
        from pkcs11 import Mechanism

        return Mechanism[self.name.removeprefix("CKM_")]

    def is_well_formed(self, body: bytes) -> bool:
        return len(body) % 8 == 0 and len(body) >= DIGEST_BYTES + 16

    def wrap(self, key: Key, sealed: bytes, context: Mapping[str, str]) -> bytes:
        plaintext = bind(sealed, context)
        if (
            len(plaintext) % 8
        ):  # tokens disagree about padding (SoftHSM2 2.6 gives it back), and sealed keys need none
            raise InvalidInput("AES key wrap takes a multiple of 8 bytes")
        if self._encrypts(key):
            return bytes(ask(key.handle.encrypt, plaintext, mechanism=self._mechanism()))
        return self._wrap_object(key, plaintext)

    def unwrap(self, key: Key, body: bytes, context: Mapping[str, str]) -> bytes:
        mechanism = self._mechanism()
        by_decrypt = key.offers(mechanism, "DECRYPT")
        if by_decrypt and not key.may("unwrap_key"):
            _need(key, "decrypt")
        if by_decrypt and key.may("decrypt"):
            return unbind(bytes(ask(key.handle.decrypt, body, mechanism=mechanism)), context)
        _need(key, "unwrap_key")
        return unbind(self._unwrap_object(key, body), context)

    # What is wrapped is a secret to the token only: it is ciphertext under the Core's seal key. It lives for the
    # moment as an object of this session, and never on the token.

    def _wrap_object(self, key: Key, plaintext: bytes) -> bytes:
        from pkcs11 import Attribute

        template = {**_object(), Attribute.VALUE: plaintext, Attribute.TOKEN: False}
        made = ask(key.session.create_object, template)
        try:
            return bytes(ask(key.handle.wrap_key, made, mechanism=self._mechanism()))
        finally:
            _destroy(made)

    def _unwrap_object(self, key: Key, body: bytes) -> bytes:
        from pkcs11 import Attribute, KeyType, ObjectClass

        made = ask(
            key.handle.unwrap_key,
            ObjectClass.SECRET_KEY,
            KeyType.GENERIC_SECRET,
            body,
            mechanism=self._mechanism(),
            store=False,
            template=_object(),
        )
        try:
            return bytes(ask(made.__getitem__, Attribute.VALUE))
        finally:
            _destroy(made)


class _Oaep:
    """RSA-OAEP: the public half wraps here, as it may anywhere; the token proves at once that it opens it.

    Where the token knows OAEP with SHA-1 only, as SoftHSM2 2.6 and many smart cards, it is asked for the bare RSA
    operation and the padding is taken off here: the same ciphertext, and the private key stays where it is.
    """

    number = RSA_OAEP_SHA256
    name = "CKM_RSA_PKCS_OAEP"

    def fits(self, key: Key) -> bool:
        return key.is_private and key.may("decrypt") and (self._offered(key) or _is_bare_offered(key))

    @staticmethod
    def _offered(key: Key) -> bool:
        from pkcs11 import Mechanism

        return key.offers(Mechanism.RSA_PKCS_OAEP, "DECRYPT")

    def is_well_formed(self, body: bytes) -> bool:
        return RSA_BITS[0] // 8 <= len(body) <= RSA_BITS[1] // 8

    def wrap(self, key: Key, sealed: bytes, context: Mapping[str, str]) -> bytes:
        body = encrypt_to(key, bind(sealed, context))
        if not hmac.compare_digest(self.unwrap(key, body, context), sealed):
            raise RootMisconfigured("the token does not give back what was wrapped to its public key")
        return body

    def unwrap(self, key: Key, body: bytes, context: Mapping[str, str]) -> bytes:
        _need(key, "decrypt")
        if len(body) != (rsa_bits(key) + 7) // 8:
            raise DecryptError
        return unbind(self._decrypt(key, body), context)

    def _decrypt(self, key: Key, body: bytes) -> bytes:
        from pkcs11 import MGF, Mechanism

        parameters = (Mechanism.SHA256, MGF.SHA256, None)
        lacking = "CKM_RSA_PKCS_OAEP is not offered"
        if self._offered(key) and not key.is_bare:
            try:
                return bytes(
                    ask(
                        key.handle.decrypt,
                        body,
                        mechanism=Mechanism.RSA_PKCS_OAEP,
                        mechanism_param=parameters,
                    )
                )
            except Answer as answer:
                if answer.code not in _NO_SUCH_PADDING:
                    raise
                lacking = answer.code
        if not _is_bare_offered(key):
            raise _NoSha256(lacking)
        block = bytes(ask(key.handle.decrypt, body, mechanism=Mechanism.RSA_X_509))
        message = unpad_oaep(block.rjust(len(body), b"\0"))
        key.is_bare = True
        return message


_NO_SUCH_PADDING: Final = frozenset(
    {"CKR_ARGUMENTS_BAD", "CKR_MECHANISM_PARAM_INVALID", "CKR_MECHANISM_INVALID"}
)


class _NoSha256(Answer):
    def error(self) -> RootMisconfigured:
        return RootMisconfigured(
            f"the token does not decrypt RSA-OAEP with SHA-256 ({self.code}), and SHA-1 is not used in its place; "
            "let the key be used with CKM_RSA_X_509 too, use an AES key, or update the token"
        )


def _is_bare_offered(key: Key) -> bool:
    from pkcs11 import Mechanism

    return key.offers(Mechanism.RSA_X_509, "DECRYPT")


WRAPPINGS: Final[tuple[Wrapping, ...]] = (
    _Gcm(),
    _KeyWrap(AES_KWP, "CKM_AES_KEY_WRAP_KWP"),
    _KeyWrap(AES_KEY_WRAP_PAD, "CKM_AES_KEY_WRAP_PAD"),
    _Oaep(),
)
"""In the order of preference."""


def parse_blob(wrapped: bytes) -> tuple[Wrapping, bytes]:
    """Split a wrapped blob: how it was wrapped, and the body; DecryptError for anything malformed."""
    if not 2 < len(wrapped) <= MAX_BLOB_BYTES or wrapped[0] != FORMAT:
        raise DecryptError
    for wrapping in WRAPPINGS:
        if wrapping.number == wrapped[1] and wrapping.is_well_formed(wrapped[2:]):
            return wrapping, bytes(wrapped[2:])
    raise DecryptError


def choose(key: Key) -> Wrapping:
    """How to wrap with a key.

    Raises:
        RootDenied: the key may not be used for any of it.
        RootMisconfigured: the token does not offer what the key could be used for.
    """
    for wrapping in WRAPPINGS:
        if wrapping.fits(key):
            return wrapping
    uses = _WRAP_USES if not key.is_private and (key.may("wrap_key") or key.may("unwrap_key")) else _USES
    for use in uses[1:] if key.is_private else uses:
        _need(key, use)
    names = ", ".join(wrapping.name for wrapping in WRAPPINGS)
    raise RootMisconfigured(
        f"the token offers this key no mechanism that a root can use: one of {names}, for what the key's attributes "
        "permit (CKA_ENCRYPT and CKA_DECRYPT, or CKA_WRAP and CKA_UNWRAP, and CKA_ALLOWED_MECHANISMS)"
    )


def check_key(key: Key) -> None:
    """Refuse what is no AES-256 key, and no RSA key of 2048 bits or more.

    Raises:
        RootMisconfigured: it is another kind of key.
    """
    from pkcs11 import Attribute, KeyType

    kind = ask(key.handle.__getitem__, Attribute.KEY_TYPE)
    if not key.is_private:
        if kind != KeyType.AES or ask(key.handle.__getitem__, Attribute.VALUE_LEN) != 32:
            raise RootMisconfigured("the key that the root's URI names is not an AES-256 key")
        return
    if kind != KeyType.RSA or not RSA_BITS[0] <= rsa_bits(key) <= RSA_BITS[1]:
        raise RootMisconfigured(
            f"the key that the root's URI names is not an RSA key of {RSA_BITS[0]} bits or more"
        )
    try:
        always = ask(key.handle.__getitem__, Attribute.ALWAYS_AUTHENTICATE)
    except Answer:
        always = False  # older tokens know no such attribute
    if always:
        raise RootMisconfigured(
            "the key asks for the PIN at each use (CKA_ALWAYS_AUTHENTICATE), which a service cannot give; "
            "make one that does not"
        )


def works(wrapping: Wrapping, key: Key) -> bool:
    """Whether the key wraps and unwraps a value of our own: then what it refused was not its own."""
    try:
        body = wrapping.wrap(key, _CHECK, _CHECK_CONTEXT)
        return wrapping.unwrap(key, body, _CHECK_CONTEXT) == _CHECK
    except (Answer, DecryptError, RootDenied, RootMisconfigured):
        return False


def rsa_bits(key: Key) -> int:
    """The length of an RSA key's modulus."""
    return _modulus(key).bit_length()


def _modulus(key: Key) -> int:
    from pkcs11 import Attribute

    return int("0" + bytes(ask(key.handle.__getitem__, Attribute.MODULUS)).hex(), 16)


def encrypt_to(key: Key, plaintext: bytes) -> bytes:
    """Encrypt by RSA-OAEP with the public half of a key, which the token gives out with the private one's handle.

    Raises:
        RootMisconfigured: it is no key that can be encrypted to.
    """
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
    from cryptography.hazmat.primitives.hashes import SHA256
    from pkcs11 import Attribute

    try:
        exponent = int("0" + bytes(ask(key.handle.__getitem__, Attribute.PUBLIC_EXPONENT)).hex(), 16)
    except Answer:
        exponent = 65537  # the private half need not know it; a wrong guess shows at once, as the token opens nothing
    try:
        public = RSAPublicNumbers(exponent, _modulus(key)).public_key()
        return public.encrypt(plaintext, OAEP(MGF1(SHA256()), SHA256(), None))
    except ValueError:
        pass
    raise RootMisconfigured("the token's RSA key is none that can be encrypted to")


def _gcm(nonce: bytes, context: Mapping[str, str]) -> dict[str, Any]:
    from pkcs11 import GCMParams, Mechanism

    return {
        "mechanism": Mechanism.AES_GCM,
        "mechanism_param": GCMParams(nonce=nonce, aad=encode_context(context), tag_bits=TAG_BYTES * 8),
    }


def _object() -> dict[Any, Any]:
    from pkcs11 import Attribute, KeyType, ObjectClass

    return {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: KeyType.GENERIC_SECRET,
        Attribute.SENSITIVE: False,
        Attribute.EXTRACTABLE: True,
    }


def _destroy(made: Any) -> None:
    try:
        ask(made.destroy)
    except Answer:
        return  # it ends with the session


def _need(key: Key, use: str) -> None:
    """RootDenied unless an attribute of the key allows a use."""
    if not key.may(use):
        attribute = f"CKA_{use.removesuffix('_key').upper()}"
        raise RootDenied(
            f"the key may not be used for this: the customer must set {attribute}", permission=attribute
        )
