# SPDX-License-Identifier: Apache-2.0
# Where the rows of a column lie. The layouts are Arrow's (Columnar Format 1.5, "Physical Memory Layout").
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    OFFSETS = 1                     # data between two offsets of 4 or 8 bytes
    FIXED = 2                       # every row has ``width`` bytes
    VIEWS = 3                       # 16 bytes a row: a length, then the bytes themselves or where they lie
    CODES = 4                       # a dictionary: the row's number in ``values``
    NOTHING = 5                     # null in every row

cdef enum:
    MISSING = 0                     # a null
    FOUND = 1
    MALFORMED = -1

cdef enum:
    VIEW = 16
    WITHIN = 12                     # a view holds up to so many bytes itself

cdef struct Piece:
    int layout
    int width                       # of an offset, a code or a row, in bytes
    bint negative                   # codes have a sign
    Py_ssize_t start, count
    const uint8_t *validity         # a bit a row, or NULL
    const uint8_t *places           # offsets, views or codes
    const uint8_t *data
    Py_ssize_t size                 # of the data; UNKNOWN where only a pointer came
    Py_ssize_t reach                # where the last byte of the data lies that a row has
    const uint8_t **buffers         # a view's data
    Py_ssize_t *sizes
    Py_ssize_t buffer_count
    Piece *values                   # a dictionary's

cdef class Cells:
    cdef readonly Py_ssize_t count, nulls, total, longest
    cdef readonly str name
    cdef Piece *pieces
    cdef Py_ssize_t *firsts         # the row at which each piece begins, and the end
    cdef Py_ssize_t piece_count
    cdef list held
    cdef list parts
    cdef int fill(self, Piece *piece, part) except -1
    cdef Py_ssize_t pin(self, source, const uint8_t **data, Py_ssize_t needed, Py_ssize_t align) except -2
    cdef int check(self) except -1
    cdef bint measure(self, Piece *piece) noexcept nogil
    cdef Py_ssize_t look(self, Piece *piece) noexcept nogil
    cdef object malformed(self, index)


cdef inline int offset_cell(const Piece *piece, Py_ssize_t at, const uint8_t **data, Py_ssize_t *size) noexcept nogil:
    cdef Py_ssize_t begin, end
    if piece.width == 4:
        begin = (<const int32_t *>piece.places)[at]
        end = (<const int32_t *>piece.places)[at + 1]
    else:
        begin = (<const int64_t *>piece.places)[at]
        end = (<const int64_t *>piece.places)[at + 1]
    if begin < 0 or end < begin or (piece.size >= 0 and end > piece.size):
        return MALFORMED
    data[0] = piece.data + begin
    size[0] = end - begin
    return FOUND


cdef inline bint piece_is_plain(const Piece *piece) noexcept nogil:
    """Whether rows lie between two offsets, and none is null."""
    return piece.layout == OFFSETS and piece.validity == NULL


cdef inline int view_cell(const Piece *piece, Py_ssize_t at, const uint8_t **data, Py_ssize_t *size) noexcept nogil:
    cdef const int32_t *view = <const int32_t *>(piece.places + at * VIEW)
    cdef Py_ssize_t buffer = view[2], begin = view[3]
    size[0] = view[0]
    if size[0] < 0:
        return MALFORMED
    if size[0] <= WITHIN:
        data[0] = <const uint8_t *>(view + 1)
        return FOUND
    if not 0 <= buffer < piece.buffer_count or begin < 0 or begin + size[0] > piece.sizes[buffer]:
        return MALFORMED
    data[0] = piece.buffers[buffer] + begin
    return FOUND


cdef inline Py_ssize_t code_at(const Piece *piece, Py_ssize_t at) noexcept nogil:
    """A dictionary's code, -1 where it is too large for any dictionary."""
    cdef uint64_t code
    if piece.width == 1:
        if piece.negative:
            return (<const int8_t *>piece.places)[at]
        return piece.places[at]
    if piece.width == 2:
        if piece.negative:
            return (<const int16_t *>piece.places)[at]
        return (<const uint16_t *>piece.places)[at]
    if piece.width == 4:
        if piece.negative:
            return (<const int32_t *>piece.places)[at]
        return (<const uint32_t *>piece.places)[at]
    code = (<const uint64_t *>piece.places)[at]
    return -1 if code >> 63 else <Py_ssize_t>code


cdef inline int piece_cell(const Piece *piece, Py_ssize_t at, const uint8_t **data, Py_ssize_t *size) noexcept nogil:
    """Point at one row's bytes; whatever a row says of itself is checked each time it is read.

    The buffers are the caller's, who may write to them meanwhile.
    """
    cdef Py_ssize_t code
    at += piece.start
    if piece.validity != NULL and not (piece.validity[at >> 3] >> (at & 7)) & 1:
        return MISSING
    if piece.layout == CODES:
        code = code_at(piece, at)
        piece = piece.values
        if not 0 <= code < piece.count:
            return MALFORMED
        at = code + piece.start
        if piece.validity != NULL and not (piece.validity[at >> 3] >> (at & 7)) & 1:
            return MISSING
    if piece.layout == OFFSETS:
        return offset_cell(piece, at, data, size)
    if piece.layout == FIXED:
        data[0] = piece.data + at * piece.width
        size[0] = piece.width
        return FOUND
    if piece.layout == VIEWS:
        return view_cell(piece, at, data, size)
    return MISSING


cdef inline void find_piece(const Py_ssize_t *firsts, Py_ssize_t *piece, Py_ssize_t at) noexcept nogil:
    """Find the piece that has row ``at``, which is in the column, from where the last one was."""
    while at >= firsts[piece[0] + 1]:
        piece[0] += 1
    while at < firsts[piece[0]]:
        piece[0] -= 1


cdef inline int find_cell(const Piece *pieces, const Py_ssize_t *firsts, Py_ssize_t *piece, Py_ssize_t at,
                          const uint8_t **data, Py_ssize_t *size) noexcept nogil:
    """Point at the bytes of row ``at``, which is in the column; ``piece`` remembers where the last one was."""
    find_piece(firsts, piece, at)
    return piece_cell(pieces + piece[0], at - firsts[piece[0]], data, size)
