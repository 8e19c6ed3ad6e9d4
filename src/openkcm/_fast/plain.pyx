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

cdef struct Walk:
    # A way through the plain rows of one piece, and through their places: where the row at hand begins and ends.
    Offsets rows, places
    const uint8_t *data
    Py_ssize_t limit, begin, end, place, after


cdef inline bint is_envelope(RecordCipher cipher) noexcept nogil:
    """Whether the layout is that of an inline envelope, whose sizes the compiler then knows."""
    return cipher.body == ENVELOPE + NONCE and cipher.middle_size == WRAPPED


cdef inline Py_ssize_t offset_at(const Offsets *offsets, Py_ssize_t at) noexcept nogil:
    return offsets.narrow[at] if offsets.narrow != NULL else <Py_ssize_t>offsets.wide[at]


cdef inline void set_offsets(Offsets *offsets, const uint8_t *places, int width) noexcept nogil:
    offsets.narrow = <const int32_t *>places if width == 4 else NULL
    offsets.wide = <const int64_t *>places


cdef inline bint walk_rows(Walk *walk, const Piece *pieces, const Py_ssize_t *firsts, Py_ssize_t number, Py_ssize_t start,
                           Py_ssize_t *stop) noexcept nogil:
    """Whether the rows from ``start`` on are plain; ``stop`` is moved to the end of their piece."""
    cdef const Piece *piece = pieces + number
    cdef Py_ssize_t first = firsts[number]
    if start >= stop[0] or not first <= start < firsts[number + 1] or not piece_is_plain(piece):
        return False
    if stop[0] > firsts[number + 1]:
        stop[0] = firsts[number + 1]
    # Read by the row's number in the column.
    set_offsets(&walk.rows, piece.places + (piece.start - first) * piece.width, piece.width)
    walk.data, walk.limit = piece.data, piece.size
    walk.begin = offset_at(&walk.rows, start)
    return True


cdef inline bint walk_run(Walk *walk, Run *run, Places places, Py_ssize_t start, Py_ssize_t *stop) noexcept nogil:
    """The same of rows whose associated data is that of the row before, with where they go."""
    if (run.context_pieces != NULL or run.aad == NULL
            or not walk_rows(walk, run.pieces, run.firsts, run.piece, start, stop)):
        return False
    set_offsets(&walk.places, places.offsets.data, places.width)
    walk.place = offset_at(&walk.places, start)
    return True


cdef inline Py_ssize_t walk_size(Walk *walk, Py_ssize_t at) noexcept nogil:
    """The bytes of row ``at``, or -1 where its offsets say none."""
    walk.end = offset_at(&walk.rows, at + 1)
    if walk.begin < 0 or walk.end < walk.begin or (walk.limit >= 0 and walk.end > walk.limit):
        return -1
    return walk.end - walk.begin


cdef inline bint walk_fits(Walk *walk, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    """Whether the place of row ``at`` has so many bytes."""
    walk.after = offset_at(&walk.places, at + 1)
    return walk.after - walk.place == size


cdef inline void walk_on(Walk *walk) noexcept nogil:
    walk.begin, walk.place = walk.end, walk.after


# ---- under the key that is set -------------------------------------------------------------------------------

cdef Py_ssize_t seal_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, uint32_t version, const uint8_t *middle) noexcept nogil:
    """Seal rows from ``start`` on under the key that is set; the row at which it ends, or BROKEN."""
    cdef Walk walk
    cdef uint8_t head[LONG]
    cdef uint8_t *output
    cdef uint8_t *target = places.target
    cdef const uint8_t *nonce
    cdef const uint8_t *aad = run.aad
    cdef int body = cipher.body, aad_size = run.aad_size
    cdef Py_ssize_t at = start, size, more = cipher.overhead()
    # A record has COMMITMENT and TAG behind its body, so that a copy of more than the body stays within it.
    if not (body <= SHORT or LONG - COMMITMENT <= body <= LONG) or not walk_run(&walk, run, places, start, &stop):
        return start
    cipher.put_head(head, run.nonces, version, middle)
    while at < stop:
        size = walk_size(&walk, at)
        if not 0 <= size <= SMALL or not walk_fits(&walk, at, size + more):
            break
        nonce = run_nonce(run)
        if nonce == NULL:
            return BROKEN
        output = target + walk.place
        if body <= SHORT:
            memcpy(output, head, SHORT)
        else:
            memcpy(output, head, LONG)
        output += body
        memcpy(output - NONCE, nonce, NONCE)
        memset(output, 0, COMMITMENT)
        okc_copy(output + COMMITMENT, walk.data + walk.begin, <size_t>size)
        if gcm_seal_kept(context, nonce, aad, aad_size, output, output, <int>(COMMITMENT + size),
                         output + COMMITMENT + size) != DONE:
            return BROKEN
        walk_on(&walk)
        at += 1
    return at


cdef Py_ssize_t open_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, const uint8_t *before, uint8_t *scratch) noexcept nogil:
    """Open rows from ``start`` on that begin as the row before does, under the key that is set; where it ends."""
    cdef Walk walk
    cdef uint8_t *target = places.target
    cdef const uint8_t *aad = run.aad
    cdef const uint8_t *row
    cdef int body = cipher.body, aad_size = run.aad_size
    cdef size_t alike = <size_t>(body - NONCE)
    cdef Py_ssize_t at = start, size, more = cipher.overhead()
    if not walk_run(&walk, run, places, start, &stop):
        return start
    while at < stop:
        size = walk_size(&walk, at) - more
        if not 0 <= size <= SMALL or not walk_fits(&walk, at, size):
            break
        row = walk.data + walk.begin
        if not (okc_same(row, before, ENVELOPE) if alike == ENVELOPE else okc_same(row, before, alike)):
            break
        row += body
        if gcm_open_kept(context, row - NONCE, aad, aad_size, scratch, row, <int>(COMMITMENT + size),
                         row + COMMITMENT + size) != DONE or not okc_is_zero32(scratch):
            break
        okc_copy(target + walk.place, scratch + COMMITMENT, <size_t>size)
        walk_on(&walk)
        at += 1
    return at


# ---- a key each ------------------------------------------------------------------------------------------

cdef Py_ssize_t seal_each(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop,
                          uint32_t version, const uint8_t *keys, const uint8_t *middles,
                          Py_ssize_t count) noexcept nogil:
    """Seal as many rows from ``start`` on as there are keys, each under the next; the row at which it ends, or BROKEN."""
    cdef Walk walk
    cdef uint8_t head[LONG]
    cdef uint8_t *output
    cdef uint8_t *target = places.target
    cdef const uint8_t *nonce
    cdef const uint8_t *aad = run.aad
    cdef int aad_size = run.aad_size
    cdef Py_ssize_t at = start, size, more = cipher.overhead()
    if count < stop - start:
        stop = start + count
    if not is_envelope(cipher) or cipher.bound or not walk_run(&walk, run, places, start, &stop):
        return start
    cipher.put_head(head, run.nonces, version, middles)
    while at < stop:
        size = walk_size(&walk, at)
        if not 0 <= size <= SMALL or not walk_fits(&walk, at, size + more):
            break
        nonce = run_nonce(run)
        if nonce == NULL:
            return BROKEN
        output = target + walk.place
        memcpy(output, head, ENVELOPE - WRAPPED)
        memcpy(output + ENVELOPE - WRAPPED, middles, WRAPPED)
        memcpy(output + ENVELOPE, nonce, NONCE)
        output += ENVELOPE + NONCE
        memset(output, 0, COMMITMENT)
        okc_copy(output + COMMITMENT, walk.data + walk.begin, <size_t>size)
        if gcm_seal(context, keys, nonce, aad, aad_size, output, output, <int>(COMMITMENT + size),
                    output + COMMITMENT + size) != DONE:
            return BROKEN
        keys += KEY
        middles += WRAPPED
        walk_on(&walk)
        at += 1
    return at


cdef Py_ssize_t gather_plain(RecordCipher cipher, Cells cells, Py_ssize_t piece, Py_ssize_t start, Py_ssize_t stop,
                             const uint8_t **last, uint8_t *target, Py_ssize_t most, Py_ssize_t *count) noexcept nogil:
    """Collect the middles of rows from ``start`` on that begin as the row before does, up to its middle; where it ends.

    ``last`` is that row's middle, and that of the row at which it ends.
    """
    cdef Walk walk
    cdef const uint8_t *middle
    cdef const uint8_t *before = last[0]
    cdef Py_ssize_t at = start, size, found = count[0], more = cipher.overhead()
    if not is_envelope(cipher) or not walk_rows(&walk, cells.pieces, cells.firsts, piece, start, &stop):
        return start
    while at < stop:
        size = walk_size(&walk, at) - more
        if not 0 <= size <= SMALL:
            break
        middle = walk.data + walk.begin + ENVELOPE - WRAPPED
        if not okc_same(middle - (ENVELOPE - WRAPPED), before - (ENVELOPE - WRAPPED), ENVELOPE - WRAPPED):
            break
        if not okc_same(middle, before, WRAPPED):
            if found == most:
                break
            memcpy(target + found * WRAPPED, middle, WRAPPED)
            found += 1
        before = middle
        walk.begin = walk.end
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
    cdef Walk walk
    cdef uint8_t *target = places.target
    cdef const uint8_t *aad = run.aad
    cdef const uint8_t *row
    cdef const uint8_t *last = before[0]
    cdef const uint8_t *key
    cdef int aad_size = run.aad_size
    cdef Py_ssize_t at = start, size, keyed = number[0], more = cipher.overhead()
    if not is_envelope(cipher) or cipher.bound or not walk_run(&walk, run, places, start, &stop):
        return start
    while at < stop:
        size = walk_size(&walk, at) - more
        if not 0 <= size <= SMALL or not walk_fits(&walk, at, size):
            break
        row = walk.data + walk.begin
        if not okc_same(row, last, ENVELOPE - WRAPPED):
            break
        key = NULL
        if not okc_same(row + ENVELOPE - WRAPPED, last + ENVELOPE - WRAPPED, WRAPPED):
            if keyed + 1 == count:
                break
            key = keys + (keyed + 1) * KEY
        if gcm_open(context, key, row + ENVELOPE, aad, aad_size, scratch, row + ENVELOPE + NONCE, <int>(COMMITMENT + size),
                    row + ENVELOPE + NONCE + COMMITMENT + size) != DONE or not okc_is_zero32(scratch):
            break
        okc_copy(target + walk.place, scratch + COMMITMENT, <size_t>size)
        if key != NULL:
            keyed += 1
        last = row
        walk_on(&walk)
        at += 1
    before[0] = last
    number[0] = keyed
    return at
