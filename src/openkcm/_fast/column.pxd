# SPDX-License-Identifier: Apache-2.0
# One row of a run, and the beginning and the end of a call.
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from .aead cimport BROKEN, DONE, REFUSED, RecordCipher
from .cells cimport FOUND, Cells
from .gcm cimport Gcm
from .places cimport Places
from .run cimport Run, run_bind, run_nonce, run_place

cdef struct Refused:
    # Pairs of a row that did not verify and -1, or of one whose key is not there and the key's number.
    Py_ssize_t *rows
    Py_ssize_t count, room

cdef int check_call(Cells cells, Places places, Py_ssize_t start, Py_ssize_t stop) except -1
cdef int settle(Py_ssize_t status, Cells cells) except -1
cdef int refuse(Refused *refused, Py_ssize_t row, Py_ssize_t number) noexcept nogil
cdef list told(Refused *refused)


cdef inline int seal_row(RecordCipher cipher, Gcm *context, Run *run, const uint8_t *key, uint32_t version,
                         const uint8_t *middle) noexcept nogil:
    """Seal the row that the item points at. A null key is that before."""
    cdef const uint8_t *nonce = run_nonce(run)
    if nonce == NULL or run_bind(run, cipher, middle, key != NULL) != DONE:
        return BROKEN
    return cipher.seal_bound(context, key, nonce, version, middle, &run.item, run.aad, run.aad_size)


cdef inline int open_row(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t at,
                         const uint8_t *key, const uint8_t *middle, uint8_t *scratch) noexcept nogil:
    """Open the row that the item points at; its place is zeroed unless it verifies. A null key is that before."""
    cdef Py_ssize_t size = run.item.size - cipher.overhead()
    cdef int status = run_place(run, places, at, size)
    if status != FOUND:
        return status
    if run_bind(run, cipher, middle, key != NULL) != DONE:
        return BROKEN
    status = cipher.open_bound(context, key, &run.item, scratch, run.aad, run.aad_size)
    if status == REFUSED:
        memset(run.item.output, 0, <size_t>size)
    return status
