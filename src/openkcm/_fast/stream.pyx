# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""The segments of a stream: STREAM over XAES-256-GCM, with one key commitment in the first segment.

Invariant: a segment's nonce is used once; the counter moves only forwards; the last segment ends the
stream, and so does one that does not verify.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t
from libc.string cimport memcpy, memset

from .aead cimport BROKEN, DONE, REFUSED
from .batch cimport ALONE, Item, bound_size, pin
from .gcm cimport Gcm, gcm_begin, gcm_end, gcm_open_end, gcm_part, gcm_seal_end, gcm_start, random_public
from .openssl cimport *
from .secret cimport *
from .wrapping cimport xaes_subkey

cdef enum:
    SEGMENT = 65536
    PREFIX = 19                     # random part of a stream's XAES nonce

cdef uint8_t[COMMITMENT] ZEROS
memset(ZEROS, 0, COMMITMENT)


cdef class StreamCipher:
    """The segments of one stream, in order: STREAM (Hoang et al., CRYPTO 2015) over XAES-256-GCM.

    The subkey is derived once from the data key and nonce[:12]; segment i is sealed with the GCM nonce
    nonce[12:] || i (4, big-endian) || last (1), so that each is a valid XAES-256-GCM ciphertext. The first
    carries the key commitment. The counter moves only forwards and the last segment ends the stream.
    """

    cdef SecretKeys subkey
    cdef uint8_t start[PREFIX]
    cdef bytes aad
    cdef const uint8_t *aad_data
    cdef int aad_size
    cdef unsigned long long counter
    cdef bint ended

    def __init__(self, SecretKeys keys not None, Py_ssize_t position, bytes aad not None, nonce=None):
        cdef WrappingKey parent
        cdef uint8_t *key
        cdef const uint8_t[::1] given
        if nonce is None:
            if random_public(self.start, PREFIX) != 1:
                raise internal_error()("OpenSSL's random generator failed")
        else:
            given = nonce
            if given.shape[0] != PREFIX:
                raise invalid_error()("a stream's nonce has 19 bytes")
            memcpy(self.start, &given[0], PREFIX)
        self.aad = aad
        self.aad_data = <const uint8_t *>PyBytes_AS_STRING(aad)
        self.aad_size = bound_size(aad)
        self.subkey = new_keys(1)
        parent = new_wrapping_key()
        key = keys.enter_at(position)
        memcpy(parent.slot.data, key, KEY)
        keys.leave()
        expand(parent, parent.slot.data)
        if not xaes_subkey(parent.slot.data, self.start, self.subkey.slot.data):
            raise internal_error()("the stream's subkey could not be derived")
        parent.wipe()

    @property
    def nonce(self):
        """The 19 random bytes to put into the stream's header."""
        return PyBytes_FromStringAndSize(<char *>self.start, PREFIX)

    def wipe(self):
        """Zero the subkey; the stream cannot go on."""
        self.subkey.wipe()

    @property
    def wiped(self):
        """Whether the subkey is gone."""
        return self.subkey.wiped

    cdef int next_segment(self, uint8_t *nonce, bint last) except -1:
        """Set the nonce of the next segment; each is used once. Returns how many bytes its commitment has."""
        cdef unsigned long long number
        # Without a GIL, two threads would be given one number; nothing in here lets go of the section.
        with cython.critical_section(self):
            number = self.counter
            if self.ended or number > 0xFFFFFFFF:
                raise limit_error()("the stream has ended, or is over 2**32 segments")
            self.counter = number + 1
            if last:
                self.ended = True
        memcpy(nonce, self.start + 12, 7)
        nonce[7] = <uint8_t>(number >> 24)
        nonce[8] = <uint8_t>((number >> 16) & 255)
        nonce[9] = <uint8_t>((number >> 8) & 255)
        nonce[10] = <uint8_t>(number & 255)
        nonce[11] = 1 if last else 0
        return 0 if number else COMMITMENT

    def seal(self, data, bint last):
        """Seal the next segment: its ciphertext and tag, with the commitment before it in the first."""
        cdef Item item
        cdef uint8_t nonce[NONCE]
        cdef list held = []
        cdef uint8_t *key
        cdef bytes output
        cdef int lead, status
        pin(data, &item.data, &item.size, held, ALONE)
        if item.size > SEGMENT:
            raise limit_error()("a segment has at most 65,536 bytes")
        key = self.subkey.enter()
        try:
            lead = self.next_segment(nonce, last)
            output = PyBytes_FromStringAndSize(NULL, lead + item.size + TAG)
            item.output = <uint8_t *>PyBytes_AS_STRING(output)
            with nogil:
                status = seal_segment(key, nonce, self.aad_data, self.aad_size, &item, lead)
        finally:
            self.subkey.leave()
        if status != DONE:
            raise internal_error()("the cipher could not encrypt")
        return output

    def open(self, data, bint last):
        """Open the next segment; None when it does not verify, after which the stream is over."""
        cdef Item item
        cdef uint8_t nonce[NONCE]
        cdef list held = []
        cdef uint8_t *key
        cdef bytes output
        cdef int lead, status
        pin(data, &item.data, &item.size, held, ALONE)
        key = self.subkey.enter()
        try:
            lead = self.next_segment(nonce, last)
            if not lead + TAG <= item.size <= lead + SEGMENT + TAG:
                self.ended = True
                return None
            output = PyBytes_FromStringAndSize(NULL, item.size - lead - TAG)
            item.output = <uint8_t *>PyBytes_AS_STRING(output)
            with nogil:
                status = open_segment(key, nonce, self.aad_data, self.aad_size, &item, lead)
        finally:
            self.subkey.leave()
        if status == BROKEN:
            raise internal_error()("the cipher could not decrypt")
        if status == REFUSED:
            self.ended = True
            return None
        return output


cdef int seal_segment(const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size, const Item *item,
                      int lead) noexcept nogil:
    cdef Gcm cipher
    cdef int status = BROKEN
    if (gcm_begin(&cipher, True, False) == DONE
            and gcm_start(&cipher, key, nonce, aad, aad_size) == DONE
            and gcm_part(&cipher, item.output, ZEROS, lead) == DONE
            and gcm_part(&cipher, item.output + lead, item.data, <int>item.size) == DONE):
        status = gcm_seal_end(&cipher, item.output + lead + item.size)
    gcm_end(&cipher)
    return status


cdef int open_segment(const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size, const Item *item,
                      int lead) noexcept nogil:
    cdef Gcm cipher
    cdef uint8_t commitment[COMMITMENT]
    cdef Py_ssize_t size = item.size - lead - TAG
    cdef int status = BROKEN
    memset(commitment, 0, COMMITMENT)
    if (gcm_begin(&cipher, False, False) == DONE
            and gcm_start(&cipher, key, nonce, aad, aad_size) == DONE
            and gcm_part(&cipher, commitment, item.data, lead) == DONE
            and gcm_part(&cipher, item.output, item.data + lead, <int>size) == DONE):
        status = gcm_open_end(&cipher, item.data + lead + size)
        if status == DONE and CRYPTO_memcmp(commitment, ZEROS, COMMITMENT) != 0:
            status = REFUSED
    gcm_end(&cipher)
    if status != DONE:
        OPENSSL_cleanse(item.output, <size_t>size)
    return status
