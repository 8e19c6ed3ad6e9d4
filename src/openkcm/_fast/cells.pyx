# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""The rows of a column, where they lie: nothing is copied.

Invariant: what a column says of its rows (offsets, views, codes) is never followed unchecked, neither here nor later;
the one thing trusted is a bare pointer's extent, which the Arrow C data interface does not tell: what rows have at first.
"""

from array import array

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free

from .secret cimport invalid_error

cdef extern from "column.h" nogil:
    int64_t okc_measure32(const int32_t *offsets, int64_t count, int64_t size, int64_t *longest)
    int64_t okc_measure64(const int64_t *offsets, int64_t count, int64_t size, int64_t *longest)

cdef enum:
    UNKNOWN = -1

cdef Py_ssize_t MOST_ROWS = <Py_ssize_t>1 << 56
cdef Py_ssize_t MOST_BYTES = <Py_ssize_t>1 << 56    # that rows may say they have together: no memory has so many


cdef class Cells:
    """The rows of one column, in any number of pieces; ``total`` counts their bytes without the nulls'.

    ``parts`` have the fields of ``openkcm.crypto.Part``; their buffers are held until this goes.
    """

    def __cinit__(self, parts, str name not None):
        cdef Py_ssize_t at
        self.name = name
        self.parts = list(parts)
        self.held = []
        self.piece_count = len(self.parts)
        self.pieces = <Piece *>calloc(<size_t>self.piece_count + 1, sizeof(Piece))
        self.firsts = <Py_ssize_t *>calloc(<size_t>self.piece_count + 2, sizeof(Py_ssize_t))
        if self.pieces == NULL or self.firsts == NULL:
            raise MemoryError()
        for at in range(self.piece_count):
            self.fill(self.pieces + at, self.parts[at])
            self.firsts[at + 1] = self.firsts[at] + self.pieces[at].count
        self.count = self.firsts[self.piece_count]
        self.check()

    def __dealloc__(self):
        cdef Py_ssize_t at
        if self.pieces != NULL:
            for at in range(self.piece_count):
                give_back(self.pieces + at)
        free(self.pieces)
        free(self.firsts)

    def __len__(self):
        return self.count

    cdef int fill(self, Piece *piece, part) except -1:
        """Take a part's fields over, and check each buffer's length and alignment against what will be read."""
        cdef Py_ssize_t end, at
        piece.layout = part.layout
        piece.width = part.width
        piece.negative = part.signed
        piece.start = part.start
        piece.count = part.count
        if piece.start < 0 or piece.count < 0 or piece.start > MOST_ROWS or piece.count > MOST_ROWS:
            raise invalid_error()(f"the {self.name} has a negative length or offset")
        end = piece.start + piece.count
        if piece.count == 0:
            piece.layout = NOTHING
        if ((piece.layout == OFFSETS and piece.width not in (4, 8))
                or (piece.layout == CODES and piece.width not in (1, 2, 4, 8))):
            raise invalid_error()(f"offsets of the {self.name} have 4 or 8 bytes, and codes 1, 2, 4 or 8")
        if part.validity is not None and piece.count:
            self.pin(part.validity, &piece.validity, (end + 7) >> 3, 1)
        if piece.layout == OFFSETS:
            self.pin(part.places, &piece.places, (end + 1) * piece.width, piece.width)
            piece.size = self.pin(part.data, &piece.data, 0, 1)
        elif piece.layout == FIXED:
            piece.size = self.pin(part.data, &piece.data, end * piece.width, 1)
        elif piece.layout == VIEWS:
            self.pin(part.places, &piece.places, end * VIEW, 4)
            piece.buffer_count = len(part.buffers)
            piece.buffers = <const uint8_t **>calloc(<size_t>piece.buffer_count + 1, sizeof(uint8_t *))
            piece.sizes = <Py_ssize_t *>calloc(<size_t>piece.buffer_count + 1, sizeof(Py_ssize_t))
            if piece.buffers == NULL or piece.sizes == NULL:
                raise MemoryError()
            for at in range(piece.buffer_count):
                piece.sizes[at] = self.pin(part.buffers[at], piece.buffers + at, 0, 1)
                if piece.sizes[at] == UNKNOWN:
                    piece.sizes[at] = part.sizes[at]
        elif piece.layout == CODES:
            self.pin(part.places, &piece.places, end * piece.width, piece.width)
            piece.values = <Piece *>calloc(1, sizeof(Piece))
            if piece.values == NULL:
                raise MemoryError()
            self.fill(piece.values, part.values)
        return 0

    cdef Py_ssize_t pin(self, source, const uint8_t **data, Py_ssize_t needed, Py_ssize_t align) except -2:
        """Point at a buffer, or take an address as it is; the buffer's size in bytes, or UNKNOWN."""
        cdef Py_ssize_t size = UNKNOWN
        if source is None:
            size = 0
        elif isinstance(source, int):
            data[0] = <const uint8_t *><uintptr_t>source
            if data[0] == NULL:
                size = 0
        else:
            view = memoryview(source)
            if not view.c_contiguous:
                raise invalid_error()(f"a buffer of the {self.name} is not contiguous")
            self.held.append(view)
            data[0] = <const uint8_t *>PyMemoryView_GET_BUFFER(view).buf
            size = PyMemoryView_GET_BUFFER(view).len
        if size != UNKNOWN and size < needed:
            raise invalid_error()(f"a buffer of the {self.name} ends before its last row")
        if needed and <uintptr_t>data[0] % <uintptr_t>align:
            raise invalid_error()(f"a buffer of the {self.name} is not aligned to {align} bytes")
        return size

    cdef int check(self) except -1:
        """Read each row's place once; where only a pointer came, nothing is read later that lies behind what rows have now."""
        cdef Py_ssize_t number, at = -1
        with nogil:
            for number in range(self.piece_count):
                if not self.measure(self.pieces + number):
                    at = self.look(self.pieces + number)
                    if at >= 0:
                        at += self.firsts[number]
                        break
        if at >= 0:
            raise self.malformed(at)
        for number in range(self.piece_count):
            bound_reach(self.pieces + number)
        return 0

    cdef bint measure(self, Piece *piece) noexcept nogil:
        """Whether a piece is plain and well, and was counted in one go."""
        cdef int64_t longest = 0, total
        if not piece_is_plain(piece):
            return False
        if piece.width == 4:
            total = okc_measure32(<const int32_t *>piece.places + piece.start, piece.count, piece.size, &longest)
        else:
            total = okc_measure64(<const int64_t *>piece.places + piece.start, piece.count, piece.size, &longest)
        if total < 0 or total > MOST_BYTES - self.total:
            return False
        piece.reach = offset_of(piece, piece.start + piece.count)
        self.total += total
        self.longest = longest if longest > self.longest else self.longest
        return True

    cdef Py_ssize_t look(self, Piece *piece) noexcept nogil:
        """Count a piece row by row; the first that is malformed, or -1."""
        cdef const uint8_t *data = NULL
        cdef Piece *owner = piece.values if piece.layout == CODES else piece
        cdef Py_ssize_t at, size = 0
        cdef int status
        for at in range(piece.count):
            status = piece_cell(piece, at, &data, &size)
            if status == MALFORMED or (status == FOUND and size > MOST_BYTES - self.total):
                return at
            if status == MISSING:
                self.nulls += 1
            else:
                self.total += size
                self.longest = size if size > self.longest else self.longest
                if owner.layout == OFFSETS and data + size > owner.data + owner.reach:
                    owner.reach = data + size - owner.data
        return -1

    cdef object malformed(self, index):
        return invalid_error()(
            f"the {self.name} is malformed: this row's place is negative, out of order or past the end", index=index)

    def value(self, Py_ssize_t at):
        """A copy of one row's bytes; None for a null."""
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t size = 0, piece = 0
        cdef int status
        if not 0 <= at < self.count:
            raise IndexError(at)
        status = find_cell(self.pieces, self.firsts, &piece, at, &data, &size)
        if status == MALFORMED:
            raise self.malformed(at)
        return PyBytes_FromStringAndSize(<const char *>data, size) if status == FOUND else None

    def first_over(self, Py_ssize_t limit):
        """The first row with more bytes than this; -1 if there is none."""
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at, size = 0, piece = 0
        if self.longest > limit:
            for at in range(self.count):
                if find_cell(self.pieces, self.firsts, &piece, at, &data, &size) == FOUND and size > limit:
                    return at
        return -1

    def sizes(self, Py_ssize_t start, Py_ssize_t stop):
        """The sizes of the rows from start to stop that are not null, in bytes."""
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at, size = 0, piece = 0
        found = array("q")
        for at in range(start, min(stop, self.count)):
            if find_cell(self.pieces, self.firsts, &piece, at, &data, &size) == FOUND:
                found.append(size)
        return found

    def after(self, Py_ssize_t start, Py_ssize_t wanted):
        """The row behind the next ``wanted`` rows that are not null."""
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at = start, size = 0, piece = 0
        if not self.nulls:
            return min(start + wanted, self.count)
        while wanted > 0 and at < self.count:
            if find_cell(self.pieces, self.firsts, &piece, at, &data, &size) != MISSING:
                wanted -= 1
            at += 1
        return at

    def valid(self, Py_ssize_t start, Py_ssize_t stop):
        """How many of the rows from start to stop are not null."""
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at, size = 0, piece = 0, count = 0
        if not self.nulls:
            return stop - start
        for at in range(start, min(stop, self.count)):
            if find_cell(self.pieces, self.firsts, &piece, at, &data, &size) != MISSING:
                count += 1
        return count

    def overlaps(self, buffer):
        """Whether a row's bytes, or what says where they are, lie within a buffer."""
        view = memoryview(buffer)
        cdef const uint8_t *begin = <const uint8_t *>PyMemoryView_GET_BUFFER(view).buf
        cdef const uint8_t *end = begin + PyMemoryView_GET_BUFFER(view).len
        cdef Py_ssize_t at
        for at in range(self.piece_count):
            if piece_overlaps(self.pieces + at, begin, end):
                return True
        return False


cdef bint piece_overlaps(const Piece *piece, const uint8_t *begin, const uint8_t *end) noexcept:
    cdef Py_ssize_t at, last = piece.start + piece.count
    cdef Py_ssize_t width = VIEW if piece.layout == VIEWS else piece.width
    if piece.count == 0 or piece.layout == NOTHING:
        return False
    if piece.validity != NULL and piece.validity < end and begin < piece.validity + ((last + 7) >> 3):
        return True
    if piece.places != NULL and piece.places < end and begin < piece.places + (last + 1) * width:
        return True
    for at in range(piece.buffer_count):
        if piece.buffers[at] < end and begin < piece.buffers[at] + piece.sizes[at]:
            return True
    if piece.layout == CODES:
        return piece_overlaps(piece.values, begin, end)
    if piece.layout == FIXED:
        return piece.data < end and begin < piece.data + last * piece.width
    if piece.layout == OFFSETS:
        # Not what the last offset says: that of a null says anything.
        return piece.data < end and begin < piece.data + (piece.size if piece.size >= 0 else piece.reach)
    return False


cdef inline Py_ssize_t offset_of(const Piece *piece, Py_ssize_t at) noexcept nogil:
    if piece.width == 4:
        return (<const int32_t *>piece.places)[at]
    return <Py_ssize_t>(<const int64_t *>piece.places)[at]


cdef void bound_reach(Piece *piece) noexcept:
    """A pointer tells no size: offsets that were changed since would be followed anywhere."""
    if piece.layout == OFFSETS and piece.size == UNKNOWN:
        piece.size = piece.reach
    if piece.values != NULL:
        bound_reach(piece.values)


cdef void give_back(Piece *piece) noexcept:
    free(piece.buffers)
    free(piece.sizes)
    if piece.values != NULL:
        give_back(piece.values)
        free(piece.values)
