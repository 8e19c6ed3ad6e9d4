# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""The commonest rows with as little as possible around the cipher: small ones between two offsets, none of them null,
that follow a row which begins as they do and whose associated data is theirs.

Invariant: these only go on as far as all is well and as expected. The row at which they end has not been worked on,
or came to nothing, and is left to the loops in ``column``, which know every case and every error.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.string cimport memcpy, memset

from .aead cimport BROKEN, DONE, SMALL, RecordCipher
from .cells cimport Cells, Piece, piece_is_plain
from .gcm cimport Gcm, gcm_open, gcm_open_kept, gcm_seal, gcm_seal_kept, okc_copy, okc_is_zero32, okc_same
from .places cimport Places
from .run cimport Run, run_nonce
from .secret cimport COMMITMENT, KEY, NONCE, WRAPPED

cdef enum:
    SHORT = 64                      # what stands before the ciphertext is copied in one move of this size,
    LONG = 128                      # or of this one
    ENVELOPE = 20 + 4 + WRAPPED     # an inline envelope up to its nonce


cdef struct Offsets:
    # Where rows begin: of 4 or of 8 bytes.
    const int32_t *narrow
    const int64_t *wide


cdef inline bint is_envelope(RecordCipher cipher) noexcept nogil:
    """Whether the layout is that of an inline envelope, whose sizes the compiler then knows."""
    return cipher.body == ENVELOPE + NONCE and cipher.middle_size == WRAPPED


cdef inline Py_ssize_t offset_at(const Offsets *offsets, Py_ssize_t at) noexcept nogil:
    return offsets.narrow[at] if offsets.narrow != NULL else <Py_ssize_t>offsets.wide[at]


cdef inline void set_offsets(Offsets *offsets, const uint8_t *places, int width) noexcept nogil:
    offsets.narrow = <const int32_t *>places if width == 4 else NULL
    offsets.wide = <const int64_t *>places


cdef inline bint find_plain(const Piece *pieces, const Py_ssize_t *firsts, Py_ssize_t piece, Py_ssize_t start,
                            Py_ssize_t *stop, Offsets *rows) noexcept nogil:
    """Whether the rows from ``start`` on are plain; ``stop`` is moved to the end of their piece."""
    cdef Py_ssize_t first = firsts[piece]
    if start >= stop[0] or not first <= start < firsts[piece + 1] or not piece_is_plain(pieces + piece):
        return False
    if stop[0] > firsts[piece + 1]:
        stop[0] = firsts[piece + 1]
    # Read by the row's number in the column.
    set_offsets(rows, pieces[piece].places + (pieces[piece].start - first) * pieces[piece].width, pieces[piece].width)
    return True


cdef inline bint begin_plain(Run *run, Places places, Py_ssize_t start, Py_ssize_t *stop, Offsets *rows,
                             Offsets *ends) noexcept nogil:
    """The same of rows whose associated data is that of the row before, with where they go."""
    if run.context_pieces != NULL or run.aad == NULL or not find_plain(run.pieces, run.firsts, run.piece, start, stop, rows):
        return False
    set_offsets(ends, places.offsets.data, places.width)
    return True


cdef Py_ssize_t seal_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, uint32_t version, const uint8_t *middle) noexcept nogil:
    """Seal rows from ``start`` on under the key that is set; the row at which it ends, or BROKEN."""
    cdef Offsets rows
    cdef Offsets ends
    cdef uint8_t head[LONG]
    cdef uint8_t *output
    cdef uint8_t *target = places.target
    cdef const uint8_t *nonce
    cdef const uint8_t *aad = run.aad
    cdef const uint8_t *data
    cdef int body = cipher.body, aad_size = run.aad_size
    cdef Py_ssize_t at = start, begin, end, size, limit, place, after, more = cipher.overhead()
    # A record has COMMITMENT and TAG behind its body, so that a copy of more than the body stays within it.
    if not (body <= SHORT or LONG - COMMITMENT <= body <= LONG) or not begin_plain(run, places, start, &stop, &rows, &ends):
        return start
    cipher.put_head(head, run.nonces, version, middle)
    data = run.pieces[run.piece].data
    limit = run.pieces[run.piece].size
    begin = offset_at(&rows, start)
    place = offset_at(&ends, start)
    while at < stop:
        end = offset_at(&rows, at + 1)
        after = offset_at(&ends, at + 1)
        if begin < 0 or end < begin or (limit >= 0 and end > limit):
            break
        size = end - begin
        if size > SMALL or after - place != size + more:
            break
        nonce = run_nonce(run)
        if nonce == NULL:
            return BROKEN
        output = target + place
        if body <= SHORT:
            memcpy(output, head, SHORT)
        else:
            memcpy(output, head, LONG)
        output += body
        memcpy(output - NONCE, nonce, NONCE)
        memset(output, 0, COMMITMENT)
        okc_copy(output + COMMITMENT, data + begin, <size_t>size)
        if gcm_seal_kept(context, nonce, aad, aad_size, output, output, <int>(COMMITMENT + size),
                         output + COMMITMENT + size) != DONE:
            return BROKEN
        begin, place = end, after
        at += 1
    return at


cdef Py_ssize_t open_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, const uint8_t *before, uint8_t *scratch) noexcept nogil:
    """Open rows from ``start`` on that begin as the row before does, under the key that is set; where it ends."""
    cdef Offsets rows
    cdef Offsets ends
    cdef uint8_t *target = places.target
    cdef const uint8_t *aad = run.aad
    cdef const uint8_t *data
    cdef const uint8_t *row
    cdef int body = cipher.body, aad_size = run.aad_size
    cdef size_t alike = <size_t>(body - NONCE)
    cdef Py_ssize_t at = start, begin, end, size, limit, place, after, more = cipher.overhead()
    if not begin_plain(run, places, start, &stop, &rows, &ends):
        return start
    data = run.pieces[run.piece].data
    limit = run.pieces[run.piece].size
    begin = offset_at(&rows, start)
    place = offset_at(&ends, start)
    while at < stop:
        end = offset_at(&rows, at + 1)
        after = offset_at(&ends, at + 1)
        if begin < 0 or end < begin or (limit >= 0 and end > limit):
            break
        size = end - begin - more
        if not 0 <= size <= SMALL or after - place != size:
            break
        row = data + begin
        if not (okc_same(row, before, ENVELOPE) if alike == ENVELOPE else okc_same(row, before, alike)):
            break
        row += body
        if gcm_open_kept(context, row - NONCE, aad, aad_size, scratch, row, <int>(COMMITMENT + size),
                         row + COMMITMENT + size) != DONE or not okc_is_zero32(scratch):
            break
        okc_copy(target + place, scratch + COMMITMENT, <size_t>size)
        begin, place = end, after
        at += 1
    return at


# ---- a key each ------------------------------------------------------------------------------------------

cdef Py_ssize_t seal_each(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop,
                          uint32_t version, const uint8_t *keys, const uint8_t *middles,
                          Py_ssize_t count) noexcept nogil:
    """Seal as many rows from ``start`` on as there are keys, each under the next; the row at which it ends, or BROKEN."""
    cdef Offsets rows
    cdef Offsets ends
    cdef uint8_t head[LONG]
    cdef uint8_t *output
    cdef uint8_t *target = places.target
    cdef const uint8_t *nonce
    cdef const uint8_t *aad = run.aad
    cdef const uint8_t *data
    cdef int aad_size = run.aad_size
    cdef Py_ssize_t at = start, begin, end, size, limit, place, after, more = cipher.overhead()
    if count < stop - start:
        stop = start + count
    if not is_envelope(cipher) or cipher.bound or not begin_plain(run, places, start, &stop, &rows, &ends):
        return start
    cipher.put_head(head, run.nonces, version, middles)
    data = run.pieces[run.piece].data
    limit = run.pieces[run.piece].size
    begin = offset_at(&rows, start)
    place = offset_at(&ends, start)
    while at < stop:
        end = offset_at(&rows, at + 1)
        after = offset_at(&ends, at + 1)
        if begin < 0 or end < begin or (limit >= 0 and end > limit):
            break
        size = end - begin
        if size > SMALL or after - place != size + more:
            break
        nonce = run_nonce(run)
        if nonce == NULL:
            return BROKEN
        output = target + place
        memcpy(output, head, ENVELOPE - WRAPPED)
        memcpy(output + ENVELOPE - WRAPPED, middles, WRAPPED)
        memcpy(output + ENVELOPE, nonce, NONCE)
        output += ENVELOPE + NONCE
        memset(output, 0, COMMITMENT)
        okc_copy(output + COMMITMENT, data + begin, <size_t>size)
        if gcm_seal(context, keys, nonce, aad, aad_size, output, output, <int>(COMMITMENT + size),
                    output + COMMITMENT + size) != DONE:
            return BROKEN
        keys += KEY
        middles += WRAPPED
        begin, place = end, after
        at += 1
    return at


cdef Py_ssize_t gather_plain(RecordCipher cipher, Cells cells, Py_ssize_t piece, Py_ssize_t start, Py_ssize_t stop,
                             const uint8_t **last, uint8_t *target, Py_ssize_t most, Py_ssize_t *count) noexcept nogil:
    """Collect the middles of rows from ``start`` on that begin as the row before does, up to its middle; where it ends.

    ``last`` is that row's middle, and that of the row at which it ends.
    """
    cdef Offsets rows
    cdef const uint8_t *data
    cdef const uint8_t *before = last[0]
    cdef Py_ssize_t at = start, begin, end, size, limit, found = count[0], more = cipher.overhead()
    if not is_envelope(cipher) or not find_plain(cells.pieces, cells.firsts, piece, start, &stop, &rows):
        return start
    data = cells.pieces[piece].data
    limit = cells.pieces[piece].size
    begin = offset_at(&rows, start)
    while at < stop:
        end = offset_at(&rows, at + 1)
        if begin < 0 or end < begin or (limit >= 0 and end > limit):
            break
        size = end - begin - more
        if (not 0 <= size <= SMALL
                or not okc_same(data + begin, before - (ENVELOPE - WRAPPED), ENVELOPE - WRAPPED)):
            break
        if not okc_same(data + begin + ENVELOPE - WRAPPED, before, WRAPPED):
            if found == most:
                break
            memcpy(target + found * WRAPPED, data + begin + ENVELOPE - WRAPPED, WRAPPED)
            found += 1
        before = data + begin + ENVELOPE - WRAPPED
        begin = end
        at += 1
    last[0] = before
    count[0] = found
    return at


cdef Py_ssize_t open_each(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop,
                          const uint8_t **before, const uint8_t *keys, Py_ssize_t count, Py_ssize_t *number,
                          uint8_t *scratch) noexcept nogil:
    """Open rows from ``start`` on that begin as the row ``before`` does, up to its middle; the row at which it ends.

    A row whose middle is another than that of the one before has the key behind the one that is set, which is
    ``number`` of ``count``. Both are those of the last row that was opened.
    """
    cdef Offsets rows
    cdef Offsets ends
    cdef uint8_t *target = places.target
    cdef const uint8_t *aad = run.aad
    cdef const uint8_t *data
    cdef const uint8_t *row
    cdef const uint8_t *last = before[0]
    cdef const uint8_t *key
    cdef int aad_size = run.aad_size
    cdef Py_ssize_t at = start, begin, end, size, limit, place, after, keyed = number[0], more = cipher.overhead()
    if not is_envelope(cipher) or cipher.bound or not begin_plain(run, places, start, &stop, &rows, &ends):
        return start
    data = run.pieces[run.piece].data
    limit = run.pieces[run.piece].size
    begin = offset_at(&rows, start)
    place = offset_at(&ends, start)
    while at < stop:
        end = offset_at(&rows, at + 1)
        after = offset_at(&ends, at + 1)
        if begin < 0 or end < begin or (limit >= 0 and end > limit):
            break
        size = end - begin - more
        row = data + begin
        if (not 0 <= size <= SMALL or after - place != size
                or not okc_same(row, last, ENVELOPE - WRAPPED)):
            break
        key = NULL
        if not okc_same(row + ENVELOPE - WRAPPED, last + ENVELOPE - WRAPPED, WRAPPED):
            if keyed + 1 == count:
                break
            key = keys + (keyed + 1) * KEY
        if gcm_open(context, key, row + ENVELOPE, aad, aad_size, scratch, row + ENVELOPE + NONCE, <int>(COMMITMENT + size),
                    row + ENVELOPE + NONCE + COMMITMENT + size) != DONE or not okc_is_zero32(scratch):
            break
        okc_copy(target + place, scratch + COMMITMENT, <size_t>size)
        if key != NULL:
            keyed += 1
        last = row
        begin, place = end, after
        at += 1
    before[0] = last
    number[0] = keyed
    return at
