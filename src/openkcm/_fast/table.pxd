# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from .aead cimport RecordCipher
from .cells cimport Piece, code_at

cdef struct Entry:
    const uint8_t *data
    Py_ssize_t size
    Py_ssize_t row

cdef enum:
    SOUGHT = 32

cdef struct Sought:
    # Values that are looked for together, each with the row that it is of.
    int count
    int unknown                     # how many of them have no number yet
    Py_ssize_t[SOUGHT] rows
    const uint8_t *data[SOUGHT]
    Py_ssize_t[SOUGHT] sizes
    uint64_t[SOUGHT] hashes
    Py_ssize_t[SOUGHT] numbers      # -1 until it is known
    uint32_t *marks[SOUGHT]         # where the number is to be noted too, or NULL

cdef inline void begin_search(Sought *sought) noexcept nogil:
    sought.count = sought.unknown = 0


cdef inline void seek(Sought *sought, Py_ssize_t row, const uint8_t *data, Py_ssize_t size) noexcept nogil:
    """Look for one more; there must be room."""
    sought.rows[sought.count] = row
    sought.data[sought.count] = data
    sought.sizes[sought.count] = size
    sought.numbers[sought.count] = -1
    sought.marks[sought.count] = NULL
    sought.unknown += 1
    sought.count += 1


cdef inline void take_known(Sought *sought, Py_ssize_t row, Py_ssize_t number) noexcept nogil:
    """Add one whose number is known; there must be room. It goes along as a value of no bytes, so that nobody has to ask."""
    sought.rows[sought.count] = row
    sought.data[sought.count] = NULL
    sought.sizes[sought.count] = 0
    sought.numbers[sought.count] = number
    sought.count += 1


cdef Py_ssize_t seek_ids(Sought *sought, RecordCipher cipher, const Piece *pieces, const Py_ssize_t *firsts, Py_ssize_t *piece,
                         Py_ssize_t at, Py_ssize_t stop) noexcept nogil

cdef class Table:
    cdef Entry *entries
    cdef uint64_t *slots
    cdef Py_ssize_t count, room
    cdef uint64_t[2] seed
    cdef list held
    cdef uint32_t **marks           # for each piece of the names that is a dictionary: its values' numbers, from 1 on; 0: not seen
    cdef Py_ssize_t marked_pieces
    cdef int mark_codes(self, const Piece *pieces, Py_ssize_t count, Py_ssize_t rows) except -1
    cdef int grow(self) noexcept nogil
    cdef int add_all(self, Sought *sought) noexcept nogil
    cdef void find_all(self, Sought *sought) noexcept nogil
    cdef void prepare(self, Sought *sought) noexcept nogil
    cdef Py_ssize_t find(self, const uint8_t *data, Py_ssize_t size, uint64_t hashed) noexcept nogil


cdef inline uint32_t *mark_of(Table table, const Piece *pieces, const Py_ssize_t *firsts, Py_ssize_t piece,
                              Py_ssize_t at) noexcept nogil:
    """Where the number of a row's code is noted; NULL where there is no such place, or the row is not well."""
    cdef Py_ssize_t code
    cdef const Piece *coded = pieces + piece
    if table.marks == NULL or table.marks[piece] == NULL:
        return NULL
    at += coded.start - firsts[piece]
    if coded.validity != NULL and not (coded.validity[at >> 3] >> (at & 7)) & 1:
        return NULL
    code = code_at(coded, at)
    return table.marks[piece] + code if 0 <= code < coded.values.count else NULL
