# SPDX-License-Identifier: Apache-2.0
# A run of rows under way: where the next one is, its context, its place and its nonce.
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from .aead cimport BROKEN, DONE, JOINED, RecordCipher
from .batch cimport Item
from .cells cimport FOUND, MALFORMED, Cells, Piece, find_cell
from .gcm cimport random_public
from .places cimport Places
from .secret cimport NONCE

cdef enum:
    CHANGED = -2                    # a buffer was written to while it was read
    NONCES = 1024                   # drawn at a time, at most; 12 KiB of the stack
    MOST_CONTEXT = 1 << 30
    MOST_PLACE = 2147483647         # a record was measured before, and changed since, if it takes more

cdef class RowContexts:
    cdef readonly Cells cells
    cdef uint8_t absent, present

cdef struct Run:
    # What a run of rows reads, its supply of nonces, and one context put together.
    const Piece *pieces
    const Py_ssize_t *firsts
    Py_ssize_t piece
    const Piece *context_pieces
    const Py_ssize_t *context_firsts
    Py_ssize_t context_piece
    uint8_t absent, present
    uint8_t *large
    Item item
    int drawn, supply               # nonces that are left, and how many are drawn at a time
    uint8_t[JOINED] small
    # The associated data of the row before, which is mostly that of the next.
    const uint8_t *aad
    int aad_size
    uint8_t[JOINED] joined
    uint8_t[NONCES * NONCE] nonces

cdef int run_start(Run *run, Cells cells, contexts, Py_ssize_t rows) except -1
cdef void run_end(Run *run) noexcept nogil
cdef int run_bind_anew(Run *run, RecordCipher cipher, const uint8_t *middle) noexcept nogil


cdef inline int run_row(Run *run, Py_ssize_t at) noexcept nogil:
    """Point the item at a row and its context: FOUND, MISSING, CHANGED, or BROKEN when memory is short."""
    cdef const uint8_t *data = NULL
    cdef Py_ssize_t size = 0
    cdef uint8_t *joined = run.small
    cdef int status = find_cell(run.pieces, run.firsts, &run.piece, at, &run.item.data, &run.item.size)
    if status != FOUND or run.context_pieces == NULL:
        return CHANGED if status == MALFORMED else status
    status = find_cell(run.context_pieces, run.context_firsts, &run.context_piece, at, &data, &size)
    if status == MALFORMED or size > MOST_CONTEXT:
        return CHANGED
    if size >= JOINED:
        free(run.large)
        run.large = joined = <uint8_t *>malloc(<size_t>size + 1)
        if joined == NULL:
            return BROKEN
    joined[0] = run.present if status == FOUND else run.absent
    if size and status == FOUND:
        memcpy(joined + 1, data, <size_t>size)
    run.item.context = joined
    run.item.context_size = <int>(size + 1) if status == FOUND else 1
    return FOUND


cdef inline int run_bind(Run *run, RecordCipher cipher, const uint8_t *middle, bint other) noexcept nogil:
    """Have the item's associated data in one piece; ``other`` says that the middle is not that of the row before."""
    if run.aad != NULL and run.context_pieces == NULL and not (other and cipher.bound):
        return DONE
    return run_bind_anew(run, cipher, middle)


cdef inline const uint8_t *run_nonce(Run *run) noexcept nogil:
    """The next nonce; NULL when the generator failed."""
    if run.drawn == 0:
        if random_public(run.nonces, run.supply * NONCE) != 1:
            return NULL
        run.drawn = run.supply
    run.drawn -= 1
    return run.nonces + run.drawn * NONCE


cdef inline int run_place(Run *run, Places places, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    """Point the item at its place; CHANGED if what goes there has another size than when it was laid out."""
    cdef Py_ssize_t begin = places.begin(at)
    if places.begin(at + 1) - begin != size or size > MOST_PLACE or begin < 0 or begin > places.total - size:
        return CHANGED
    run.item.output = places.target + begin
    return FOUND
