# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Rows of delimited text without quotes: where each field is, and the same text with some columns replaced.

Invariant: what is not replaced is copied as it is, byte for byte. Only the fields of columns that are asked for
become objects; a row of many columns costs little more than its bytes.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM, PyList_New, PyList_SET_ITEM
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from .secret cimport invalid_error

cdef enum:
    NEWLINE = 10
    RETURN = 13
    QUOTE = 34

cdef Py_ssize_t MAX_TEXT = 2**32 - 2

# ---- base64 (RFC 4648, section 4) ----------------------------------------------------------------------

cdef const uint8_t *ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
cdef uint8_t PAIRS[8192]            # the two characters of each 12 bits: half the look-ups of one by one


cdef void fill_pairs() noexcept:
    cdef int bits
    for bits in range(4096):
        PAIRS[2 * bits] = ALPHABET[bits >> 6]
        PAIRS[2 * bits + 1] = ALPHABET[bits & 63]


fill_pairs()


cdef inline Py_ssize_t base64_size(Py_ssize_t size) noexcept nogil:
    return (size + 2) // 3 * 4


cdef void base64_encode(uint8_t *target, const uint8_t *data, Py_ssize_t size) noexcept nogil:
    cdef uint8_t last[3]
    cdef uint64_t word
    cdef uint32_t bits
    while size >= 8:
        # Eight bytes in one load, six of them used.
        word = (<uint64_t>data[0] << 56 | <uint64_t>data[1] << 48 | <uint64_t>data[2] << 40 | <uint64_t>data[3] << 32
                | <uint64_t>data[4] << 24 | <uint64_t>data[5] << 16 | <uint64_t>data[6] << 8 | <uint64_t>data[7])
        memcpy(target, PAIRS + 2 * (word >> 52), 2)
        memcpy(target + 2, PAIRS + 2 * (word >> 40 & 4095), 2)
        memcpy(target + 4, PAIRS + 2 * (word >> 28 & 4095), 2)
        memcpy(target + 6, PAIRS + 2 * (word >> 16 & 4095), 2)
        target += 8
        data += 6
        size -= 6
    while size > 0:
        last[0] = data[0]
        last[1] = data[1] if size > 1 else 0
        last[2] = data[2] if size > 2 else 0
        bits = <uint32_t>last[0] << 16 | <uint32_t>last[1] << 8 | last[2]
        memcpy(target, PAIRS + 2 * (bits >> 12), 2)
        memcpy(target + 2, PAIRS + 2 * (bits & 4095), 2)
        if size < 3:
            target[3] = b"="
        if size < 2:
            target[2] = b"="
        target += 4
        data += 3
        size -= 3


# ---- finding fields ------------------------------------------------------------------------------------

cdef struct Shape:
    Py_ssize_t rows
    Py_ssize_t delimiters
    Py_ssize_t returns
    Py_ssize_t quotes


cdef void count_marks(const uint8_t *data, Py_ssize_t size, uint8_t delimiter, Shape *shape) noexcept nogil:
    cdef uint8_t rows, delimiters, returns, quotes
    cdef Py_ssize_t at = 0, stop
    memset(shape, 0, sizeof(Shape))
    while at < size:
        # No byte counts to more than 255, so that a compiler can count as many bytes at once as a register holds.
        stop = at + 255 if size - at > 255 else size
        rows = delimiters = returns = quotes = 0
        while at < stop:
            rows = <uint8_t>(rows + (data[at] == NEWLINE))
            delimiters = <uint8_t>(delimiters + (data[at] == delimiter))
            returns = <uint8_t>(returns + (data[at] == RETURN))
            quotes = <uint8_t>(quotes + (data[at] == QUOTE))
            at += 1
        shape.rows += rows
        shape.delimiters += delimiters
        shape.returns += returns
        shape.quotes += quotes


cdef bint find_fields(const uint8_t *data, Py_ssize_t size, uint8_t delimiter, Py_ssize_t columns, bint returns,
                      Py_ssize_t rows, uint32_t *starts) noexcept nogil:
    """Write where each field starts, and whether each row has its columns and its line end.

    There is room for rows * columns + 1: the text has been counted, and ends with the last newline.
    """
    cdef Py_ssize_t at, field = 1
    starts[0] = 0
    for at in range(size):
        # Written always and kept sometimes: no branch that a processor would guess wrong at every field.
        starts[field] = <uint32_t>at + 1
        field += (data[at] == delimiter) | (data[at] == NEWLINE)
    for at in range(1, rows + 1):
        field = starts[at * columns]
        if data[field - 1] != NEWLINE or (returns and (field < 2 or data[field - 2] != RETURN)):
            return False
    return True


def split_rows(bytes data not None, Py_ssize_t columns, bytes delimiter not None, bytes end not None):
    """Find the fields of whole rows; None unless all have that many columns, that line end, and no quote.

    Args:
        data: rows, each with its end.
        columns: how many fields each row has, two or more.
        delimiter: one byte.
        end: a newline, or a carriage return and a newline.
    """
    cdef const uint8_t *text = <const uint8_t *>PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef bint returns = end == b"\r\n"
    cdef FlatRows rows
    cdef Shape shape
    cdef uint8_t mark
    cdef bint whole
    if PyBytes_GET_SIZE(delimiter) != 1 or delimiter in b'\n\r"' or not (returns or end == b"\n"):
        raise invalid_error()("a delimiter is one byte, and a line end a newline with or without a carriage return")
    if columns < 2 or size == 0 or size > MAX_TEXT or text[size - 1] != NEWLINE:
        return None
    mark = <uint8_t>PyBytes_AS_STRING(delimiter)[0]
    with nogil:
        count_marks(text, size, mark, &shape)
    if (shape.quotes or shape.returns != (shape.rows if returns else 0)
            or shape.delimiters % (columns - 1) or shape.delimiters // (columns - 1) != shape.rows):
        return None
    rows = FlatRows.__new__(FlatRows, shape.rows, columns)
    rows.data = data
    rows.end_size = 1 + returns
    with nogil:
        whole = find_fields(text, size, mark, columns, returns, rows.count, rows.starts)
    return rows if whole else None


# ---- columns -------------------------------------------------------------------------------------------

cdef struct Value:
    const uint8_t *data
    Py_ssize_t size


cdef struct Column:
    Value *values                   # NULL while the column is as it was read
    bint encode


cdef class FlatRows:
    """The rows of one text; made by ``split_rows``."""

    cdef readonly Py_ssize_t count
    cdef Py_ssize_t columns, end_size
    cdef bytes data
    cdef uint32_t *starts
    cdef Column *replaced
    cdef dict held

    def __cinit__(self, Py_ssize_t count, Py_ssize_t columns):
        self.count = count
        self.columns = columns
        self.held = {}
        self.starts = <uint32_t *>malloc((<size_t>(count * columns) + 1) * sizeof(uint32_t))
        self.replaced = <Column *>calloc(<size_t>columns, sizeof(Column))
        if self.starts == NULL or self.replaced == NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef Py_ssize_t index
        if self.replaced != NULL:
            for index in range(self.columns):
                free(self.replaced[index].values)
        free(self.replaced)
        free(self.starts)

    cdef inline Py_ssize_t stop(self, Py_ssize_t row, Py_ssize_t index) noexcept nogil:
        """Where a field ends."""
        cdef Py_ssize_t after = self.starts[row * self.columns + index + 1]
        return after - (self.end_size if index == self.columns - 1 else 1)

    cdef int check(self, Py_ssize_t index) except -1:
        if not 0 <= index < self.columns:
            raise invalid_error()("there is no column at that position")
        return 0

    def column(self, Py_ssize_t index):
        """The values of a column, as they were read."""
        cdef const char *text = PyBytes_AS_STRING(self.data)
        cdef list values = PyList_New(self.count)
        cdef Py_ssize_t row, start
        cdef bytes value
        self.check(index)
        for row in range(self.count):
            start = self.starts[row * self.columns + index]
            value = PyBytes_FromStringAndSize(text + start, self.stop(row, index) - start)
            Py_INCREF(value)
            PyList_SET_ITEM(values, row, value)
        return values

    def replace(self, Py_ssize_t index, values, bint encode=False):
        """Put other values into a column, or with ``encode`` their base64 text (RFC 4648, section 4)."""
        cdef list held = list(values)       # our own references, until the rows are written
        cdef Value *pinned
        cdef Py_ssize_t row
        cdef object value
        self.check(index)
        if len(held) != self.count:
            raise invalid_error()("there must be one value for each row")
        for row in range(self.count):
            if not PyBytes_CheckExact(<object>PyList_GET_ITEM(held, row)):
                raise TypeError("the values of a column are bytes")
        pinned = <Value *>malloc((<size_t>self.count + 1) * sizeof(Value))
        if pinned == NULL:
            raise MemoryError()
        for row in range(self.count):
            value = <object>PyList_GET_ITEM(held, row)
            pinned[row].data = <const uint8_t *>PyBytes_AS_STRING(value)
            pinned[row].size = PyBytes_GET_SIZE(value)
        free(self.replaced[index].values)
        self.replaced[index].values = pinned
        self.replaced[index].encode = encode
        self.held[index] = held

    def dump(self):
        """The text, with the columns that were replaced."""
        cdef Py_ssize_t size
        cdef const uint8_t *text = <const uint8_t *>PyBytes_AS_STRING(self.data)
        cdef bytes output
        cdef uint8_t *target
        with nogil:
            size = self.dump_size()
        output = PyBytes_FromStringAndSize(NULL, size)
        target = <uint8_t *>PyBytes_AS_STRING(output)
        with nogil:
            self.write(text, target)
        return output

    cdef Py_ssize_t dump_size(self) noexcept nogil:
        cdef Py_ssize_t size = self.starts[self.count * self.columns]
        cdef Py_ssize_t index, row
        cdef Column *column
        for index in range(self.columns):
            column = self.replaced + index
            if column.values == NULL:
                continue
            for row in range(self.count):
                size += base64_size(column.values[row].size) if column.encode else column.values[row].size
                size -= self.stop(row, index) - <Py_ssize_t>self.starts[row * self.columns + index]
        return size

    cdef void write(self, const uint8_t *text, uint8_t *target) noexcept nogil:
        cdef Py_ssize_t copied = 0, row, index, start
        cdef Column *column
        cdef Value *value
        for row in range(self.count):
            for index in range(self.columns):
                column = self.replaced + index
                if column.values == NULL:
                    continue
                value = column.values + row
                start = self.starts[row * self.columns + index]
                memcpy(target, text + copied, <size_t>(start - copied))
                target += start - copied
                if column.encode:
                    base64_encode(target, value.data, value.size)
                    target += base64_size(value.size)
                else:
                    memcpy(target, value.data, <size_t>value.size)
                    target += value.size
                copied = self.stop(row, index)
        start = self.starts[self.count * self.columns]
        memcpy(target, text + copied, <size_t>(start - copied))
