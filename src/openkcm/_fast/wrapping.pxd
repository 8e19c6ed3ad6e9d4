# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t

cdef int xaes_subkey(const uint8_t *schedule, const uint8_t *nonce, uint8_t *subkey) noexcept nogil
