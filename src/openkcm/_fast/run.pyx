# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""A context for each row of a column, and the start of a run of rows.

Invariant: what a run points to is held by the objects it was started from, which outlive it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t
from libc.stdlib cimport free

from .aead cimport BROKEN, DONE, JOINED, RecordCipher
from .cells cimport Cells
from .secret cimport invalid_error


cdef class RowContexts:
    """A context for each row: ``present`` and its bytes, or ``absent`` alone for a null; one byte each."""

    def __init__(self, Cells cells not None, bytes absent not None, bytes present not None):
        self.cells = cells
        self.absent, self.present = <uint8_t>absent[0], <uint8_t>present[0]


cdef int run_start(Run *run, Cells cells, contexts, Py_ssize_t rows) except -1:
    """Begin a run of so many rows."""
    cdef RowContexts each
    cdef bytes one
    run.pieces, run.firsts, run.piece = cells.pieces, cells.firsts, 0
    run.context_pieces, run.context_piece = NULL, 0
    run.large = NULL
    run.aad = NULL
    run.aad_size = 0
    run.drawn = 0
    run.supply = <int>rows if 0 < rows < NONCES else NONCES
    if isinstance(contexts, RowContexts):
        each = contexts
        if each.cells.count != cells.count:
            raise invalid_error()("there must be one context for each record")
        run.context_pieces, run.context_firsts = each.cells.pieces, each.cells.firsts
        run.absent, run.present = each.absent, each.present
    else:
        one = contexts
        run.item.context = <const uint8_t *>PyBytes_AS_STRING(one)
        run.item.context_size = <int>PyBytes_GET_SIZE(one)
    return 0


cdef int run_bind_anew(Run *run, RecordCipher cipher, const uint8_t *middle) noexcept nogil:
    if run.aad_size > JOINED:
        free(<void *>run.aad)
    run.aad = cipher.bind(middle, &run.item, run.joined, &run.aad_size)
    if run.aad == NULL:
        run.aad_size = 0
        return BROKEN
    return DONE


cdef void run_end(Run *run) noexcept nogil:
    """Free what was put together outside the run."""
    if run.aad_size > JOINED:
        free(<void *>run.aad)
    free(run.large)
