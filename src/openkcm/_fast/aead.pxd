# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from .batch cimport Batch, Item
from .gcm cimport Gcm, gcm_open, gcm_seal, okc_copy, okc_is_zero32, okc_same
from .secret cimport SecretKeys
from .secret cimport COMMITMENT, NONCE, TAG, WRAPPED

cdef enum:
    DONE = 1
    REFUSED = 0
    BROKEN = -1
    VERSION = 4                     # bytes of the service key version
    JOINED = 512                    # associated data up to here is put together on the stack
    ROOM = 64                       # heads and associated data up to here are copied in one move of a fixed size
    SMALL = 2048                    # records up to here are ciphered in one call through a scratch buffer

cdef Py_ssize_t MAX_RECORD

cdef class RecordCipher:
    cdef bytes head, aad
    cdef const uint8_t *head_data
    cdef const uint8_t *aad_data
    cdef uint8_t[ROOM] head_room
    cdef uint8_t[ROOM] aad_room
    cdef int head_size, middle_size, aad_size, body
    cdef bint bound

    cdef inline Py_ssize_t overhead(self) noexcept nogil:
        return self.body + COMMITMENT + TAG

    cdef inline bint takes(self, const uint8_t *data, Py_ssize_t size) noexcept nogil:
        """Whether bytes have this layout's head and a size that fits it."""
        return (size >= self.overhead() and size - self.overhead() <= MAX_RECORD
                and okc_same(data, self.head_room, <size_t>self.head_size))

    cdef inline bint follows(self, const uint8_t *data, Py_ssize_t size, const uint8_t *last) noexcept nogil:
        """Whether bytes begin as a record of this layout does, down to its middle, and have a size that fits it."""
        return (size >= self.overhead() and size - self.overhead() <= MAX_RECORD
                and okc_same(data, last, <size_t>(self.body - NONCE)))

    cdef inline uint32_t version(self, const uint8_t *data) noexcept nogil:
        data += self.head_size
        return <uint32_t>data[0] << 24 | <uint32_t>data[1] << 16 | <uint32_t>data[2] << 8 | data[3]

    cdef inline const uint8_t *middle(self, const uint8_t *data) noexcept nogil:
        return data + self.head_size + VERSION

    cdef const uint8_t *bind(self, const uint8_t *middle, const Item *item, uint8_t *joined, int *size) noexcept nogil
    cdef inline uint8_t *put_head(self, uint8_t *output, const uint8_t *nonce, uint32_t version,
                                  const uint8_t *middle) noexcept nogil:
        """Write what stands before the ciphertext; where that begins."""
        # A copy whose size the compiler knows is a few moves; every record has so much behind its head.
        memcpy(output, self.head_room, ROOM)
        output += self.head_size
        output[0] = <uint8_t>(version >> 24)
        output[1] = <uint8_t>((version >> 16) & 255)
        output[2] = <uint8_t>((version >> 8) & 255)
        output[3] = <uint8_t>(version & 255)
        output += VERSION
        if self.middle_size == WRAPPED:
            memcpy(output, middle, WRAPPED)
        else:
            okc_copy(output, middle, <size_t>self.middle_size)
        output += self.middle_size
        memcpy(output, nonce, NONCE)
        return output + NONCE

    cdef inline int seal_bound(self, Gcm *cipher, const uint8_t *key, const uint8_t *nonce, uint32_t version,
                               const uint8_t *middle, const Item *item, const uint8_t *aad, int aad_size) noexcept nogil:
        """Seal a record whose associated data is put together."""
        return seal_record(cipher, key, nonce, aad, aad_size, item.data, item.size,
                           self.put_head(item.output, nonce, version, middle))

    cdef inline int open_bound(self, Gcm *cipher, const uint8_t *key, const Item *item, uint8_t *scratch,
                               const uint8_t *aad, int aad_size) noexcept nogil:
        """Open a record whose associated data is put together."""
        return open_record(cipher, key, item.data + self.body - NONCE, aad, aad_size, item.data + self.body,
                           item.size - self.overhead(), item.output, scratch)

    cdef int seal(self, Gcm *cipher, const uint8_t *key, const uint8_t *nonce, uint32_t version,
                  const uint8_t *middle, const Item *item) noexcept nogil
    cdef int open(self, Gcm *cipher, const uint8_t *key, const Item *item, uint8_t *scratch) noexcept nogil
    cdef object open_alone(self, SecretKeys keys, Py_ssize_t position, bytes context, blob, out)
    cpdef object place(self, blob)
    cdef int check_size(self, Py_ssize_t size, Py_ssize_t index) except -1
    cdef int seal_loop(self, uint8_t *keys, uint32_t version, const uint8_t *middles, Batch batch) noexcept nogil
    cdef Py_ssize_t open_loop(self, uint8_t *keys, Batch batch, uint8_t *failed, bint outcomes) noexcept nogil


cdef int seal_long(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                   const uint8_t *data, Py_ssize_t size, uint8_t *output) noexcept nogil
cdef int open_long(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                   const uint8_t *data, Py_ssize_t size, uint8_t *output, uint8_t *scratch) noexcept nogil


cdef inline int seal_record(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                            const uint8_t *data, Py_ssize_t size, uint8_t *output) noexcept nogil:
    """The tail of an envelope: ciphertext of zeros and plaintext, then the tag."""
    if size > SMALL:
        return seal_long(cipher, key, nonce, aad, aad_size, data, size, output)
    # One call over a copy is faster than two calls while the record is small.
    memset(output, 0, COMMITMENT)
    okc_copy(output + COMMITMENT, data, <size_t>size)
    return gcm_seal(cipher, key, nonce, aad, aad_size, output, output, <int>(COMMITMENT + size),
                    output + COMMITMENT + size)


cdef inline int open_record(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                            const uint8_t *data, Py_ssize_t size, uint8_t *output, uint8_t *scratch) noexcept nogil:
    """Open ciphertext and tag (``size`` counts the plaintext only) into ``output``; nothing stands there on failure."""
    cdef int status
    if size > SMALL:
        return open_long(cipher, key, nonce, aad, aad_size, data, size, output, scratch)
    status = gcm_open(cipher, key, nonce, aad, aad_size, scratch, data, <int>(COMMITMENT + size),
                      data + COMMITMENT + size)
    if status == DONE and not okc_is_zero32(scratch):
        status = REFUSED
    if status == DONE:
        okc_copy(output, scratch + COMMITMENT, <size_t>size)
    return status
