# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Where the rows of a result go: offsets first, then one run of data that every row fills in its place.

Invariant: the offsets are our own and are never read from a caller's buffer, so that no row is written out of its
place, whatever happens to the inputs meanwhile. A row that was laid out and then passed over, because its input was
changed, is found before the result is given away.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from .aead cimport RecordCipher
from .cells cimport FOUND, Cells, Piece, find_cell, piece_cell, piece_is_plain
from .openssl cimport OPENSSL_cleanse
from .secret cimport internal_error, invalid_error

cdef Py_ssize_t MOST_NARROW = 2**31 - 1


cdef class Memory:
    """Writable bytes for a result; what they hold at first is whatever was there before.

    With ``again`` they may wait for the next such result when they are let go, as they are: not for plaintext.
    """

    def __cinit__(self, Py_ssize_t size, bint again=False):
        if size < 0:
            raise ValueError("memory has a size of at least 0")
        self.data = <uint8_t *>(okc_take_again(<size_t>size, &self.room) if again else okc_take(<size_t>size))
        if self.data == NULL:
            raise MemoryError()
        self.size = size

    def __dealloc__(self):
        if self.room:
            okc_give_again(self.data, self.room)
        else:
            free(self.data)

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, 0, flags)


cdef class Shared:
    """A view's memory, for any number of threads to make views of.

    Views that are made of a view share its count, which without a GIL is not safe for threads in CPython 3.13, and in
    releases of 3.14 (issue 127716): memory goes while it is read. This counts nothing, and holds a view of its own.
    """

    cdef object held
    cdef void *data
    cdef Py_ssize_t size
    cdef bint readonly

    def __cinit__(self, source):
        self.held = memoryview(source)
        self.data = PyMemoryView_GET_BUFFER(self.held).buf
        self.size = PyMemoryView_GET_BUFFER(self.held).len
        self.readonly = PyMemoryView_GET_BUFFER(self.held).readonly

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size, self.readonly, flags)


cdef class Places:
    """The places of a result's rows; a null takes none. ``wide`` asks for offsets of 8 bytes.

    ``most`` is the most that the rows take together: what is laid out to more was changed while it was read.
    """

    def __init__(self, Py_ssize_t count, Py_ssize_t most, bint wide):
        self.count, self.most = count, most
        self.width = 8 if wide or most > MOST_NARROW else 4
        self.offsets = Memory((count + 1) * self.width)
        self.put(0, 0)

    def lay_sealed(self, Cells cells not None, RecordCipher cipher not None):
        """Give every row its own bytes and the cipher's overhead."""
        if not self.lay(cells, cipher.overhead()):
            raise invalid_error()("a buffer of the column was changed while it was read")

    def lay_alike(self, Cells cells not None, RecordCipher first not None, RecordCipher second not None):
        """Give every record its plaintext's bytes as if all were of one cipher, which the first row alone is asked for.

        Returns 1 for the first cipher, 2 for the second, 0 for neither or where a row is too short for it. Nothing
        else is looked at: that a row was of another is found when it is passed over.
        """
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at, size = 0, piece = 0
        self.check_range(cells.count, 0, self.count)
        for at in range(self.count):
            if find_cell(cells.pieces, cells.firsts, &piece, at, &data, &size) == FOUND:
                if first.takes(data, size) and first.version(data) != 0:
                    return 1 if self.lay(cells, -first.overhead()) else 0
                if second.takes(data, size) and second.version(data) == 0:
                    return 2 if self.lay(cells, -second.overhead()) else 0
                return 0
        return 0

    cdef bint lay(self, Cells cells, Py_ssize_t more) except -1:
        """Give every row its own bytes and so many more; False where a row has fewer than are to be taken away."""
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t number, at, first, size = 0, place = 0
        cdef uint8_t *bits = NULL
        cdef int status
        self.check_range(cells.count, 0, self.count)
        if cells.nulls:
            self.bits()
            bits = self.validity.data
        with nogil:
            for number in range(cells.piece_count):
                first = cells.firsts[number]
                if piece_is_plain(cells.pieces + number):
                    place = self.lay_plain(cells.pieces + number, first, place, more)
                else:
                    for at in range(first, cells.firsts[number + 1]):
                        status = piece_cell(cells.pieces + number, at - first, &data, &size)
                        if status == FOUND:
                            place = okc_after_row(place, size, more)
                            if place < 0:
                                break
                        elif bits != NULL:
                            bits[at >> 3] &= <uint8_t>~(1 << (at & 7))
                        self.put(at + 1, place)
                if place < 0:
                    break
        if place < 0:
            return False
        self.total = place
        self.nulls = cells.nulls
        self.check_total()
        return True

    cdef Py_ssize_t lay_plain(self, const Piece *piece, Py_ssize_t start, Py_ssize_t place,
                              Py_ssize_t more) noexcept nogil:
        """Lay a plain piece, whose first row is ``start``, out from a place on; where it ends, or -1: see ``lay``."""
        cdef const int32_t *narrow = <const int32_t *>piece.places + piece.start
        cdef const int64_t *wide = <const int64_t *>piece.places + piece.start
        cdef int32_t *narrow_ends = <int32_t *>self.offsets.data + start + 1
        cdef int64_t *wide_ends = <int64_t *>self.offsets.data + start + 1
        if piece.width == 4 and self.width == 4:
            return okc_lay32_32(narrow, piece.count, piece.size, more, place, narrow_ends)
        if piece.width == 4:
            return okc_lay32_64(narrow, piece.count, piece.size, more, place, wide_ends)
        if self.width == 4:
            return okc_lay64_32(wide, piece.count, piece.size, more, place, narrow_ends)
        return okc_lay64_64(wide, piece.count, piece.size, more, place, wide_ends)

    def lay_opened(self, Cells cells not None, RecordCipher first not None, RecordCipher second not None, bint every):
        """Give every record its plaintext's bytes; (records of each cipher, rows that are of neither).

        Without ``every`` it ends at the first row of neither.
        """
        cdef Py_ssize_t counts[2]
        cdef Py_ssize_t at = 0
        self.check_range(cells.count, 0, self.count)
        counts[0] = counts[1] = 0
        bad = []
        if cells.nulls:
            self.bits()
        self.total = 0
        self.nulls = cells.nulls
        while True:
            with nogil:
                at = self.lay_run(cells, first, second, at, counts)
            if at == self.count:
                self.check_total()
                return counts[0], counts[1], bad
            bad.append(at)
            if not every:
                return counts[0], counts[1], bad
            self.put(at + 1, self.total)
            at += 1

    cdef Py_ssize_t lay_run(self, Cells cells, RecordCipher first, RecordCipher second, Py_ssize_t start,
                            Py_ssize_t *counts) noexcept nogil:
        """Go on from a row to the next that is of neither cipher, or to the end."""
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at, size = 0, piece = 0
        cdef uint8_t *bits = self.validity.data if cells.nulls else NULL
        cdef int status
        for at in range(start, self.count):
            status = find_cell(cells.pieces, cells.firsts, &piece, at, &data, &size)
            if status == FOUND:
                if first.takes(data, size) and first.version(data) != 0:
                    counts[0] += 1
                    self.total += size - first.overhead()
                elif second.takes(data, size) and second.version(data) == 0:
                    counts[1] += 1
                    self.total += size - second.overhead()
                else:
                    return at
            elif bits != NULL:
                bits[at >> 3] &= <uint8_t>~(1 << (at & 7))
            self.put(at + 1, self.total)
        return self.count

    cdef int check_total(self) except -1:
        if self.total > self.most:
            raise invalid_error()("a buffer of the column was changed while it was read")
        return 0

    def expect(self, skipped=()):
        """From now on every row that is not null has to be filled, but for these."""
        cdef Py_ssize_t size = ((self.count + 63) >> 6) * 8
        self.unfilled = Memory(size)
        memset(self.unfilled.data, 0, <size_t>size)
        if self.validity is not None:
            memcpy(self.unfilled.data, self.validity.data, <size_t>self.validity.size)
        else:
            memset(self.unfilled.data, 255, <size_t>(self.count >> 3))
            if self.count & 7:
                self.unfilled.data[self.count >> 3] = <uint8_t>((1 << (self.count & 7)) - 1)
        for at in skipped:
            self.check_range(self.count, at, at + 1)
            self.filled(at)

    def first_unfilled(self, Py_ssize_t start, Py_ssize_t stop):
        """The first row from start on that has to be filled and was not; -1 if there is none."""
        if self.unfilled is None:
            raise internal_error()("nothing is expected of these rows")
        self.check_range(self.count, start, stop)
        return okc_first_bit(<const uint64_t *>self.unfilled.data, start, stop)

    def attach(self, data):
        """Set where the rows go: a writable, contiguous buffer that holds them all, looked at before anything is written."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        cdef Py_ssize_t size = view.len
        self.target = <uint8_t *>view.buf
        PyBuffer_Release(&view)
        if size < self.total:
            self.target = NULL
            raise invalid_error()(f"the result takes {self.total} bytes and out= has {size}")
        # A memoryview holds the buffer where it is for as long as this is alive.
        self.data = memoryview(data)

    def wipe(self):
        """Zero the rows that were written."""
        if self.target != NULL:
            OPENSSL_cleanse(self.target, <size_t>self.total)

    def clear(self, Py_ssize_t at):
        """Make a row null, and zero its place."""
        self.check_range(self.count, at, at + 1)
        self.bits()
        self.nulls += (self.validity.data[at >> 3] >> (at & 7)) & 1
        self.validity.data[at >> 3] &= <uint8_t>~(1 << (at & 7))
        if self.target != NULL:
            memset(self.target + self.begin(at), 0, <size_t>(self.begin(at + 1) - self.begin(at)))

    def first_no_text(self, Py_ssize_t start, Py_ssize_t stop):
        """The first row from start on that is not UTF-8, or ``stop``."""
        cdef Py_ssize_t at
        cdef bint text = True
        self.check_range(self.count, start, stop)
        with nogil:
            for at in range(start, stop):
                text = okc_is_utf8(self.target + self.begin(at), <size_t>(self.begin(at + 1) - self.begin(at)))
                if not text:
                    break
        return stop if text else at

    def stop_for(self, Py_ssize_t start, Py_ssize_t rows, Py_ssize_t size):
        """Where a run of at most so many rows and bytes, but one row at least, ends."""
        cdef Py_ssize_t stop = min(start + rows, self.count)
        self.check_range(self.count, start, stop)
        while stop > start + 1 and self.begin(stop) - self.begin(start) > size:
            stop = start + (stop - start) // 2
        return stop

    cdef int check_range(self, Py_ssize_t count, Py_ssize_t start, Py_ssize_t stop) except -1:
        if count != self.count or not 0 <= start <= stop <= self.count:
            raise IndexError("no such rows")
        return 0

    cdef Memory bits(self):
        """A bit for each row, all of them set at first; what is behind the last row is zero."""
        cdef Py_ssize_t size = (self.count + 7) >> 3
        if self.validity is None:
            self.validity = Memory(size)
            memset(self.validity.data, 255, <size_t>size)
            if self.count & 7:
                self.validity.data[size - 1] = <uint8_t>((1 << (self.count & 7)) - 1)
        return self.validity
