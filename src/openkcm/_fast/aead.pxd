# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcmp

from .batch cimport Batch, Item
from .gcm cimport Gcm
from .secret cimport SecretKeys
from .secret cimport COMMITMENT, TAG

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
                and memcmp(data, self.head_data, <size_t>self.head_size) == 0)

    cdef inline uint32_t version(self, const uint8_t *data) noexcept nogil:
        data += self.head_size
        return <uint32_t>data[0] << 24 | <uint32_t>data[1] << 16 | <uint32_t>data[2] << 8 | data[3]

    cdef inline const uint8_t *middle(self, const uint8_t *data) noexcept nogil:
        return data + self.head_size + VERSION

    cdef const uint8_t *bind(self, const uint8_t *middle, const Item *item, uint8_t *joined, int *size) noexcept nogil
    cdef int seal(self, Gcm *cipher, const uint8_t *key, const uint8_t *nonce, uint32_t version,
                  const uint8_t *middle, const Item *item) noexcept nogil
    cdef int open(self, Gcm *cipher, const uint8_t *key, const Item *item, uint8_t *scratch) noexcept nogil
    cdef object open_alone(self, SecretKeys keys, Py_ssize_t position, bytes context, blob)
    cpdef object place(self, blob)
    cdef int check_size(self, Py_ssize_t size, Py_ssize_t index) except -1
    cdef int seal_loop(self, uint8_t *keys, uint32_t version, const uint8_t *middles, Batch batch) noexcept nogil
    cdef Py_ssize_t open_loop(self, uint8_t *keys, Batch batch, uint8_t *failed, bint outcomes) noexcept nogil
