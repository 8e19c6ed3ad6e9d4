# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Keys wrapped by keys: XAES-256-GCM (C2SP, XAES-256-GCM.md), one at a time and in packed batches.

Invariant: the wrapping key is touched only as raw AES blocks on its slot in secret memory; what reaches
a cipher is the subkey of one batch, and keys go from slot to slot.

A batch draws the first 12 nonce bytes once, so that one subkey serves it, and a random start from which
the last 12 count: every wrapped key is a valid XAES-256-GCM ciphertext with a nonce of its own, and two
batches share a subkey with probability 2**-96.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from .batch cimport bound_size
from .gcm cimport Gcm, gcm_begin, gcm_end, gcm_open, gcm_seal, random_private, random_public
from .openssl cimport *
from .secret cimport *
from .turns cimport turn_begin, turn_end

cdef enum:
    HALF = 12                       # the XAES nonce's part that picks the subkey, and the GCM nonce's size


cdef int xaes_subkey(const uint8_t *schedule, const uint8_t *nonce, uint8_t *subkey) noexcept nogil:
    """Derive Kx = AES_K(M1 ^ K1) || AES_K(M2 ^ K1) from a schedule with its mask and nonce[:12]."""
    cdef uint8_t block[16]
    cdef int part, at, done = 1
    for part in range(2):
        block[0] = 0
        block[1] = <uint8_t>(part + 1)
        block[2] = 0x58             # "X"
        block[3] = 0
        memcpy(block + 4, nonce, HALF)
        for at in range(16):
            block[at] ^= schedule[OKC_SCHEDULE_BYTES + at]
        done &= okc_aes256_block(schedule, block, subkey + 16 * part)
    OPENSSL_cleanse(block, 16)
    return done


cdef void count_up(uint8_t *counter) noexcept nogil:
    cdef int at
    for at in range(HALF - 1, -1, -1):
        counter[at] = <uint8_t>(counter[at] + 1)
        if counter[at]:
            return


cdef uint8_t *join(const uint8_t *aad, int aad_size, int id_size) noexcept nogil:
    """Room for the associated data of a batch, with that of all its keys in place; to be freed."""
    cdef uint8_t *joined = <uint8_t *>malloc(<size_t>(aad_size + id_size + 1))
    if joined != NULL:
        memcpy(joined, aad, <size_t>aad_size)
    return joined


cdef int wrap_run(const uint8_t *schedule, const uint8_t *keys, Py_ssize_t count, const uint8_t *aad,
                  int aad_size, const uint8_t *ids, int id_size, uint8_t *output) noexcept nogil:
    cdef uint8_t nonce[XAES_NONCE]
    cdef uint8_t subkey[KEY]
    cdef uint8_t *joined = join(aad, aad_size, id_size)
    cdef const uint8_t *key = subkey
    cdef Gcm cipher
    cdef Py_ssize_t at
    cdef int status = gcm_begin(&cipher, True, count < 2)
    if joined == NULL or random_public(nonce, XAES_NONCE) != 1 or not xaes_subkey(schedule, nonce, subkey):
        status = -1
    if status == 1:
        for at in range(count):
            if id_size:
                memcpy(joined + aad_size, ids + at * id_size, <size_t>id_size)
            memcpy(output, nonce, XAES_NONCE)
            status = gcm_seal(&cipher, key, nonce + HALF, joined, aad_size + id_size, output + XAES_NONCE,
                              keys + at * KEY, KEY, output + XAES_NONCE + KEY)
            if status != 1:
                break
            key = NULL              # the subkey stays set
            count_up(nonce + HALF)
            output += WRAPPED
    gcm_end(&cipher)
    OPENSSL_cleanse(subkey, KEY)
    free(joined)
    return status


cdef Py_ssize_t unwrap_run(const uint8_t *schedule, const uint8_t *wrapped, Py_ssize_t count, const uint8_t *aad,
                           int aad_size, const uint8_t *ids, int id_size, uint8_t *keys,
                           uint8_t *failed) noexcept nogil:
    """Open ``count`` wrapped keys; marks those that do not verify. Returns how many did not, or -1."""
    cdef uint8_t subkey[KEY]
    cdef uint8_t *joined = join(aad, aad_size, id_size)
    cdef const uint8_t *blob = wrapped
    cdef const uint8_t *keyed = NULL
    cdef const uint8_t *key
    cdef Gcm cipher
    cdef Py_ssize_t at, bad = 0
    cdef int status = gcm_begin(&cipher, False, True)
    if joined == NULL:
        status = -1
    for at in range(count):
        if status < 0:
            break
        key = NULL
        # Keys wrapped in one batch share a subkey; only a change of it costs a derivation and a key set-up.
        if keyed == NULL or memcmp(keyed, blob, HALF) != 0:
            if not xaes_subkey(schedule, blob, subkey):
                status = -1
                break
            keyed = blob
            key = subkey
            cipher.brief = at + 1 == count or memcmp(blob, blob + WRAPPED, HALF) != 0
        if id_size:
            memcpy(joined + aad_size, ids + at * id_size, <size_t>id_size)
        status = gcm_open(&cipher, key, blob + HALF, joined, aad_size + id_size, keys + at * KEY,
                          blob + XAES_NONCE, KEY, blob + XAES_NONCE + KEY)
        blob += WRAPPED
        failed[at] = 0 if status == 1 else 1
        if status == 0:
            bad += 1
            # A place that did not open holds a key nobody knows, so that using it by mistake fails too.
            if random_private(keys + at * KEY, KEY) != 1:
                status = -1
    gcm_end(&cipher)
    OPENSSL_cleanse(subkey, KEY)
    free(joined)
    return -1 if status < 0 else bad


cdef int check_ids(Py_ssize_t count, bytes ids) except -1:
    if PyBytes_GET_SIZE(ids) and PyBytes_GET_SIZE(ids) != count * KEY_ID:
        raise invalid_error()("ids have 16 bytes for each key, or are left out")
    return 0


def wrap_many(WrappingKey parent not None, SecretKeys keys not None, bytes aad not None, bytes ids not None=b""):
    """Wrap data keys: n x 72 bytes. The associated data of key i is ``aad`` followed by its id, if ids are given."""
    check_ids(keys.count, ids)
    cdef bytes output = PyBytes_FromStringAndSize(NULL, keys.count * WRAPPED)
    cdef uint8_t *target = <uint8_t *>PyBytes_AS_STRING(output)
    cdef const uint8_t *bound = <const uint8_t *>PyBytes_AS_STRING(aad)
    cdef const uint8_t *names = <const uint8_t *>PyBytes_AS_STRING(ids)
    cdef int aad_size = bound_size(aad)
    cdef int id_size = KEY_ID if PyBytes_GET_SIZE(ids) else 0
    cdef uint8_t *schedule = parent.enter()
    cdef uint8_t *data
    cdef int status
    try:
        data = keys.enter()
        with nogil:
            turn_end()
            status = wrap_run(schedule, data, keys.count, bound, aad_size, names, id_size, target)
            turn_begin()
        keys.leave()
    finally:
        parent.leave()
    if status != 1:
        raise internal_error()("the cipher could not wrap the keys")
    return output


cdef Py_ssize_t unwrap_into(WrappingKey parent, bytes wrapped, bytes aad, bytes ids, SecretKeys keys,
                            bytearray failed) except -1:
    cdef const uint8_t *source = <const uint8_t *>PyBytes_AS_STRING(wrapped)
    cdef const uint8_t *bound = <const uint8_t *>PyBytes_AS_STRING(aad)
    cdef const uint8_t *names = <const uint8_t *>PyBytes_AS_STRING(ids)
    cdef uint8_t[::1] marks = failed
    cdef int aad_size = bound_size(aad)
    cdef int id_size = KEY_ID if PyBytes_GET_SIZE(ids) else 0
    cdef uint8_t *schedule = parent.enter()
    cdef uint8_t *data
    cdef Py_ssize_t bad
    try:
        data = keys.enter()
        with nogil:
            turn_end()
            bad = unwrap_run(schedule, source, keys.count, bound, aad_size, names, id_size, data, &marks[0])
            turn_begin()
        keys.leave()
    finally:
        parent.leave()
    if bad < 0:
        keys.wipe()
        raise internal_error()("the cipher could not unwrap the keys")
    return bad


cdef SecretKeys keys_for(bytes wrapped, bytes ids):
    if PyBytes_GET_SIZE(wrapped) == 0 or PyBytes_GET_SIZE(wrapped) % WRAPPED:
        raise invalid_error()("wrapped keys have 72 bytes each")
    check_ids(PyBytes_GET_SIZE(wrapped) // WRAPPED, ids)
    return new_keys(PyBytes_GET_SIZE(wrapped) // WRAPPED)


cdef list marked(bytearray failed):
    return [at for at, mark in enumerate(failed) if mark]


def unwrap_many(WrappingKey parent not None, bytes wrapped not None, bytes aad not None, bytes ids not None=b""):
    """Open wrapped data keys; returns the keys and the positions that did not verify."""
    cdef SecretKeys keys = keys_for(wrapped, ids)
    cdef bytearray failed = bytearray(keys.count)
    return keys, (marked(failed) if unwrap_into(parent, wrapped, aad, ids, keys, failed) else [])


def rewrap_many(WrappingKey old not None, WrappingKey new not None, bytes wrapped not None, bytes old_aad not None,
                bytes new_aad not None, bytes ids not None=b""):
    """Move wrapped data keys from one wrapping key to another; positions that did not verify come out as zeros."""
    cdef SecretKeys keys
    cdef bytes output
    keys, failed = unwrap_many(old, wrapped, old_aad, ids)
    output = wrap_many(new, keys, new_aad, ids)
    keys.wipe()
    for at in failed:
        memset(PyBytes_AS_STRING(output) + <Py_ssize_t>at * WRAPPED, 0, WRAPPED)
    return output, failed


def wrap_key(WrappingKey parent not None, WrappingKey child not None, bytes aad not None):
    """Wrap one wrapping key under another: 72 bytes."""
    cdef bytes output = PyBytes_FromStringAndSize(NULL, WRAPPED)
    cdef int aad_size = bound_size(aad)
    cdef uint8_t *schedule = parent.enter()
    cdef uint8_t *key
    cdef int status
    try:
        key = child.enter()         # a schedule begins with its key
        status = wrap_run(schedule, key, 1, <const uint8_t *>PyBytes_AS_STRING(aad), aad_size,
                          NULL, 0, <uint8_t *>PyBytes_AS_STRING(output))
        child.leave()
    finally:
        parent.leave()
    if status != 1:
        raise internal_error()("the cipher could not wrap the key")
    return output


def unwrap_key(WrappingKey parent not None, bytes wrapped not None, bytes aad not None):
    """Open a wrapped wrapping key; raises the decrypt error when it does not verify."""
    cdef WrappingKey child
    cdef int aad_size = bound_size(aad)
    cdef uint8_t failed = 0
    cdef uint8_t *schedule
    cdef Py_ssize_t bad
    if PyBytes_GET_SIZE(wrapped) != WRAPPED:
        raise decrypt_error()()
    child = new_wrapping_key()
    schedule = parent.enter()
    bad = unwrap_run(schedule, <const uint8_t *>PyBytes_AS_STRING(wrapped), 1,
                     <const uint8_t *>PyBytes_AS_STRING(aad), aad_size, NULL, 0,
                     child.slot.data, &failed)
    parent.leave()
    if bad:
        child.wipe()
        raise (decrypt_error()() if bad > 0 else internal_error()("the cipher could not unwrap the key"))
    expand(child, child.slot.data)
    return child


# ---- for test vectors only: nothing in the package calls these ------------------------------------------

def _xaes_seal(bytes key not None, bytes nonce not None, bytes aad not None, bytes plaintext not None):
    """XAES-256-GCM with a given nonce."""
    from .aead import _gcm_seal
    return _gcm_seal(_subkey(key, nonce), nonce[HALF:], aad, plaintext)


def _xaes_open(bytes key not None, bytes nonce not None, bytes aad not None, bytes ciphertext not None):
    """The inverse of ``_xaes_seal``; None when the tag does not verify."""
    from .aead import _gcm_open
    return _gcm_open(_subkey(key, nonce), nonce[HALF:], aad, ciphertext)


cdef bytes _subkey(bytes key, bytes nonce):
    from .secret import import_wrapping_key
    cdef WrappingKey parent = import_wrapping_key(key)
    cdef bytes subkey = PyBytes_FromStringAndSize(NULL, KEY)
    if len(nonce) != XAES_NONCE:
        raise invalid_error()("an XAES nonce has 24 bytes")
    xaes_subkey(parent.enter(), <const uint8_t *>PyBytes_AS_STRING(nonce), <uint8_t *>PyBytes_AS_STRING(subkey))
    parent.leave()
    return subkey


def native_info():
    """Tell how raw AES blocks, those of the key derivation, are made; and what is weaker than it could be."""
    notes = []
    if not okc_aes_instructions():
        notes.append("raw AES blocks go through a short-lived OpenSSL context, not the processor's instructions")
    return {"aes": "AES-NI on the key's slot" if okc_aes_instructions() else "OpenSSL", "notes": notes}
