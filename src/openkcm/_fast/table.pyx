# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""The distinct values of a column: subjects by name, stored data keys by id.

Invariant: a table is filled by one thread and only read from then on. It points into the column, which it holds, and
its hash has a random seed: who chooses the names cannot choose where they fall. Of a dictionary each value is looked up
once, and its rows are found by their codes.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp

from .aead cimport RecordCipher
from .cells cimport CODES, FOUND, Cells, Piece, find_cell, find_piece, piece_cell
from .gcm cimport random_public
from .places cimport okc_hash, okc_prefetch
from .secret cimport internal_error, invalid_error

cdef enum:
    FIRST_ROOM = 256

cdef Py_ssize_t MOST = 2**31 - 1
cdef uint64_t LOW = 0xFFFFFFFFU
cdef uint64_t HIGH = 0xFFFFFFFF00000000U


cdef class Table:
    """Distinct byte strings, numbered in the order in which they first appear."""

    def __cinit__(self):
        self.held = []
        self.room = FIRST_ROOM
        self.entries = <Entry *>realloc(NULL, <size_t>self.room * sizeof(Entry))
        self.slots = <uint64_t *>calloc(<size_t>self.room * 2, sizeof(uint64_t))
        if self.entries == NULL or self.slots == NULL:
            raise MemoryError()
        if random_public(<uint8_t *>self.seed, sizeof(self.seed)) != 1:
            raise internal_error()("the random generator failed")

    def __dealloc__(self):
        cdef Py_ssize_t piece
        free(self.entries)
        free(self.slots)
        for piece in range(self.marked_pieces):
            free(self.marks[piece])
        free(self.marks)

    def __len__(self):
        return self.count

    def add_names(self, Cells names not None, Cells cells not None):
        """Take in the name of each row that is not null in ``cells``; the first row without a name, or -1."""
        cdef Sought sought
        cdef const uint8_t *data = NULL
        cdef uint32_t *mark
        cdef Py_ssize_t at = 0, size = 0, piece = 0, other = 0
        cdef int status = FOUND
        if names.count != cells.count:
            raise invalid_error()(f"there are {cells.count} records and {names.count} subjects")
        if self.count or self.marks != NULL:
            raise invalid_error()("a table takes the names of one column")
        self.held.append(names)
        self.mark_codes(names.pieces, names.piece_count, names.count)
        with nogil:
            while at < cells.count and status == FOUND:
                begin_search(&sought)
                while at < cells.count and sought.count < SOUGHT:
                    if not cells.nulls or find_cell(cells.pieces, cells.firsts, &other, at, &data, &size) == FOUND:
                        find_piece(names.firsts, &piece, at)
                        mark = mark_of(self, names.pieces, names.firsts, piece, at)
                        if mark == NULL or mark[0] == 0:
                            status = piece_cell(names.pieces + piece, at - names.firsts[piece], &data, &size)
                            if status != FOUND:
                                break
                            seek(&sought, at, data, size)
                            sought.marks[sought.count - 1] = mark
                    at += 1
                if self.add_all(&sought) != FOUND:
                    status = -2
        if status == FOUND:
            return -1
        if status == -2:
            raise MemoryError()
        return at

    def add_ids(self, RecordCipher cipher not None, Cells cells not None):
        """Take in the part behind the version of each record of this cipher; how many records those are."""
        cdef Sought sought
        cdef Py_ssize_t at = 0, piece = 0, taken = 0
        cdef int status = FOUND
        self.held.append(cells)
        with nogil:
            while at < cells.count and status == FOUND:
                at = seek_ids(&sought, cipher, cells.pieces, cells.firsts, &piece, at, cells.count)
                status = self.add_all(&sought)
                taken += sought.count
        if status != FOUND:
            raise MemoryError()
        return taken

    def values(self, Py_ssize_t start, Py_ssize_t stop):
        """Copies of the distinct values from one number to another."""
        return [
            PyBytes_FromStringAndSize(<const char *>self.entries[at].data, self.entries[at].size)
            for at in range(max(start, 0), min(stop, self.count))
        ]

    def row(self, Py_ssize_t number):
        """The row in which a value first appeared."""
        if not 0 <= number < self.count:
            raise IndexError(number)
        return self.entries[number].row

    cdef int mark_codes(self, const Piece *pieces, Py_ssize_t count, Py_ssize_t rows) except -1:
        """Make room for the numbers of each dictionary's values, unless it has more of them than the column has rows."""
        cdef Py_ssize_t piece
        self.marks = <uint32_t **>calloc(<size_t>count + 1, sizeof(uint32_t *))
        if self.marks == NULL:
            raise MemoryError()
        self.marked_pieces = count
        for piece in range(count):
            if pieces[piece].layout == CODES and pieces[piece].values.count <= rows:
                self.marks[piece] = <uint32_t *>calloc(<size_t>pieces[piece].values.count + 1, sizeof(uint32_t))
                if self.marks[piece] == NULL:
                    raise MemoryError()
        return 0

    cdef int grow(self) noexcept nogil:
        """Twice the room; a slot has half a hash above and a number, from 1 on, below."""
        cdef Entry *entries = <Entry *>realloc(self.entries, <size_t>self.room * 2 * sizeof(Entry))
        cdef uint64_t *slots
        cdef uint64_t mask = <uint64_t>self.room * 4 - 1, at, hashed
        cdef Py_ssize_t number
        if entries == NULL:
            return -1
        self.entries = entries
        slots = <uint64_t *>calloc(<size_t>self.room * 4, sizeof(uint64_t))
        if slots == NULL:
            return -1
        for number in range(self.count):
            hashed = okc_hash(entries[number].data, <size_t>entries[number].size, self.seed)
            at = hashed & mask
            while slots[at]:
                at = (at + 1) & mask
            slots[at] = (hashed & HIGH) | <uint64_t>(number + 1)
        free(self.slots)
        self.slots = slots
        self.room *= 2
        return FOUND

    cdef int add_all(self, Sought *sought) noexcept nogil:
        """Number each value unless it is there; FOUND, or -1 when memory is short."""
        cdef uint64_t mask, at
        cdef int number
        self.prepare(sought)
        for number in range(sought.count):
            sought.numbers[number] = self.find(sought.data[number], sought.sizes[number], sought.hashes[number])
            if sought.numbers[number] >= 0:
                note(sought, number)
                continue
            if self.count == MOST or (self.count == self.room and self.grow() != FOUND):
                return -1
            mask = <uint64_t>self.room * 2 - 1
            at = sought.hashes[number] & mask
            while self.slots[at]:
                at = (at + 1) & mask
            self.slots[at] = (sought.hashes[number] & HIGH) | <uint64_t>(self.count + 1)
            self.entries[self.count].data = sought.data[number]
            self.entries[self.count].size = sought.sizes[number]
            self.entries[self.count].row = sought.rows[number]
            sought.numbers[number] = self.count
            note(sought, number)
            self.count += 1
        return FOUND

    cdef void find_all(self, Sought *sought) noexcept nogil:
        """Set each value's number, -1 where it is not there."""
        cdef int number
        if sought.unknown == 0:
            return
        self.prepare(sought)
        for number in range(sought.count):
            if sought.numbers[number] < 0:
                sought.numbers[number] = self.find(sought.data[number], sought.sizes[number], sought.hashes[number])

    cdef void prepare(self, Sought *sought) noexcept nogil:
        """Set the hashes, and have what they lead to come from memory side by side: each step waits for the one before."""
        cdef uint64_t mask = <uint64_t>self.room * 2 - 1, slot
        cdef int number
        for number in range(sought.count):
            sought.hashes[number] = okc_hash(sought.data[number], <size_t>sought.sizes[number], self.seed)
            okc_prefetch(self.slots + (sought.hashes[number] & mask))
        for number in range(sought.count):
            slot = self.slots[sought.hashes[number] & mask]
            if slot:
                okc_prefetch(self.entries + <Py_ssize_t>((slot & LOW) - 1))
        for number in range(sought.count):
            slot = self.slots[sought.hashes[number] & mask]
            if slot:
                okc_prefetch(self.entries[<Py_ssize_t>((slot & LOW) - 1)].data)

    cdef Py_ssize_t find(self, const uint8_t *data, Py_ssize_t size, uint64_t hashed) noexcept nogil:
        """A value's number, or -1."""
        cdef uint64_t mask = <uint64_t>self.room * 2 - 1
        cdef uint64_t at = hashed & mask, slot
        cdef const Entry *entry
        while True:
            slot = self.slots[at]
            if slot == 0:
                return -1
            if ((slot ^ hashed) & HIGH) == 0:
                entry = self.entries + <Py_ssize_t>((slot & LOW) - 1)
                if entry.size == size and memcmp(entry.data, data, <size_t>size) == 0:
                    return entry - self.entries
            at = (at + 1) & mask


cdef inline void note(Sought *sought, int number) noexcept nogil:
    if sought.marks[number] != NULL:
        sought.marks[number][0] = <uint32_t>(sought.numbers[number] + 1)


cdef Py_ssize_t seek_ids(Sought *sought, RecordCipher cipher, const Piece *pieces, const Py_ssize_t *firsts, Py_ssize_t *piece,
                         Py_ssize_t at, Py_ssize_t stop) noexcept nogil:
    """Seek the ids of the next records of this cipher from row ``at`` on; the row at which it ends."""
    cdef const uint8_t *data = NULL
    cdef Py_ssize_t size = 0
    begin_search(sought)
    while at < stop and sought.count < SOUGHT:
        if find_cell(pieces, firsts, piece, at, &data, &size) == FOUND and cipher.takes(data, size) and cipher.version(data) == 0:
            seek(sought, at, cipher.middle(data), cipher.middle_size)
        at += 1
    return at
