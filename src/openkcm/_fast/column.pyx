# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Records of a column: sealed and opened from where they lie to where they go, with no object each.

Invariant: as in ``aead``: plaintext leaves only after its tag and its commitment verified, and every nonce is drawn in
here. A call works on a run of rows, on its own cipher context; calls on other runs may go on beside it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from .aead cimport BROKEN, DONE, REFUSED, SMALL, RecordCipher
from .cells cimport FOUND, MISSING, Cells, find_cell
from .gcm cimport Gcm, gcm_begin, gcm_end, okc_same
from .openssl cimport *
from .places cimport Places
from .plain cimport gather_plain, open_each, open_plain, seal_each, seal_plain
from .ring cimport Held
from .run cimport CHANGED, Run, run_end, run_place, run_row, run_start
from .secret cimport *
from .turns cimport turn_begin, turn_end

cdef enum:
    FIRST_REFUSED = 64


cdef int check_call(Cells cells, Places places, Py_ssize_t start, Py_ssize_t stop) except -1:
    places.check_range(cells.count, start, stop)
    if (places.target == NULL and places.total) or places.unfilled is None:
        raise internal_error()("the result has no memory yet")
    return 0


cdef int settle(Py_ssize_t status, Cells cells) except -1:
    if status == CHANGED:
        raise invalid_error()(f"a buffer of the {cells.name} was changed while it was read")
    if status < 0:
        raise internal_error()("the cipher failed, or memory is short")
    return 0


# ---- sealing -------------------------------------------------------------------------------------------

def seal_rows(RecordCipher cipher not None, Cells cells not None, contexts, Places places not None, Py_ssize_t start,
              Py_ssize_t stop, SecretKeys keys not None, bint shared, uint32_t version, bytes middles not None):
    """Seal a run of rows: each that is not null under the next of the keys, or with ``shared`` all under the first."""
    cdef Run run
    cdef const uint8_t *parts = middles
    cdef uint8_t *data
    cdef Py_ssize_t status, count = keys.count
    check_call(cells, places, start, stop)
    if len(middles) != count * cipher.middle_size:
        raise invalid_error()("each key needs its own middle part")
    run_start(&run, cells, contexts, stop - start)
    data = keys.enter()
    with nogil:
        turn_end()
        status = seal_range(cipher, &run, places, start, stop, data, count, shared, version, parts)
        run_end(&run)
        turn_begin()
    keys.leave()
    settle(status, cells)


cdef Py_ssize_t seal_range(RecordCipher cipher, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop,
                           const uint8_t *keys, Py_ssize_t count, bint shared, uint32_t version,
                           const uint8_t *middles) noexcept nogil:
    cdef Gcm context
    cdef const uint8_t *key = keys
    cdef Py_ssize_t at = start, used = 0, done, more = cipher.overhead()
    cdef int status = DONE
    if gcm_begin(&context, True, not shared) != DONE:
        gcm_end(&context)
        return BROKEN
    while at < stop:
        status = run_row(run, at)
        if status == FOUND:
            status = run_place(run, places, at, run.item.size + more)
        if status == FOUND and used == count and not shared:
            status = CHANGED
        if status == FOUND:
            status = seal_row(cipher, &context, run, key if shared else keys + used * KEY, version,
                              middles if shared else middles + used * cipher.middle_size)
        elif status == MISSING and places.begin(at + 1) == places.begin(at):
            at += 1
            status = DONE
            continue
        elif status == MISSING:
            status = CHANGED            # it was no null when it was laid out
        if status != DONE:
            break
        used += 1
        at += 1
        if shared:
            key = NULL
            at = seal_plain(cipher, &context, run, places, at, stop, version, middles)
        else:
            done = seal_each(cipher, &context, run, places, at, stop, version, keys + used * KEY,
                             middles + used * cipher.middle_size, count - used)
            used += done - at if done > at else 0
            at = done
        if at < 0:
            status = BROKEN
            break
    gcm_end(&context)
    if status != DONE:
        return status
    places.filled_run(start, stop)
    return used


# ---- opening -------------------------------------------------------------------------------------------

cdef int refuse(Refused *refused, Py_ssize_t row, Py_ssize_t number) noexcept nogil:
    """Note a row; DONE, or BROKEN when memory is short."""
    cdef Py_ssize_t room = 2 * refused.room if refused.room else FIRST_REFUSED
    cdef Py_ssize_t *rows
    if refused.count == refused.room:
        rows = <Py_ssize_t *>realloc(refused.rows, <size_t>room * 2 * sizeof(Py_ssize_t))
        if rows == NULL:
            return BROKEN
        refused.rows, refused.room = rows, room
    refused.rows[2 * refused.count] = row
    refused.rows[2 * refused.count + 1] = number
    refused.count += 1
    return DONE


cdef list told(Refused *refused):
    """The rows that were noted, each with its number."""
    cdef Py_ssize_t at
    return [(refused.rows[2 * at], refused.rows[2 * at + 1]) for at in range(refused.count)]


def gather_rows(RecordCipher cipher not None, Cells cells not None, Py_ssize_t start, Py_ssize_t stop, uint32_t after,
                Py_ssize_t most):
    """Collect the middles of this cipher's records of the lowest version above ``after``: (version, packed middles,
    whether there are higher versions), or None. Records that follow each other with one middle give it once.

    With more than ``most`` middles the version is 0, and nothing was collected.
    """
    cdef uint32_t version = 0
    cdef Py_ssize_t count
    cdef bint more = False
    cdef bytes packed
    cdef uint8_t *target
    if not 0 <= start <= stop <= cells.count:
        raise IndexError("no such rows")
    most = min(most, stop - start)
    packed = PyBytes_FromStringAndSize(NULL, most * cipher.middle_size)
    target = <uint8_t *>PyBytes_AS_STRING(packed)
    with nogil:
        turn_end()
        count = gather(cipher, cells, start, stop, after, most, &version, &more, target)
        turn_begin()
    if count == 0:
        return None
    if count < 0:
        return 0, b"", True
    return version, packed if count == most else packed[:count * cipher.middle_size], more


cdef Py_ssize_t gather(RecordCipher cipher, Cells cells, Py_ssize_t start, Py_ssize_t stop, uint32_t after,
                       Py_ssize_t most, uint32_t *version, bint *more, uint8_t *target) noexcept nogil:
    cdef const uint8_t *data = NULL
    cdef const uint8_t *last = NULL
    cdef Py_ssize_t at, size = 0, piece = 0, count = 0
    cdef size_t width = <size_t>cipher.middle_size
    cdef uint32_t found
    at = start
    while at < stop:
        if last != NULL:
            at = gather_plain(cipher, cells, piece, at, stop, &last, target, most, &count)
            if at == stop:
                break
        at += 1
        if (find_cell(cells.pieces, cells.firsts, &piece, at - 1, &data, &size) != FOUND
                or not cipher.takes(data, size)):
            continue
        found = cipher.version(data)
        if found <= after:
            continue
        if count and found > version[0]:
            more[0] = True
            continue
        if count and found < version[0]:
            more[0] = True
            count = 0
            last = NULL
        version[0] = found
        data = cipher.middle(data)
        if last == NULL or not okc_same(last, data, width):
            if count == most:
                return -1
            memcpy(target + count * cipher.middle_size, data, width)
            count += 1
        last = data
    return count


def open_rows(RecordCipher cipher not None, Cells cells not None, contexts, Places places not None, Py_ssize_t start,
              Py_ssize_t stop, uint32_t version, SecretKeys keys not None, bytes without not None):
    """Open this cipher's records of one version, with a key for each middle that ``gather_rows`` gave.

    ``without`` has a byte for each key that is not there, or is empty. Returns the rows that did not verify and those
    whose key is not there, each with its key's number (-1 if it is there).
    """
    cdef Run run
    cdef Held held
    cdef const uint8_t *missing = without
    cdef Py_ssize_t status, at
    cdef Refused refused
    check_call(cells, places, start, stop)
    if len(without) != 0 and len(without) != keys.count:
        raise invalid_error()("there must be one mark for each key")
    run_start(&run, cells, contexts, stop - start)
    memset(&refused, 0, sizeof(refused))
    try:
        held.keys[0] = keys.enter()
        held.first, held.count, held.stride = 0, keys.count, keys.count
        if len(without) == 0:
            missing = NULL
        with nogil:
            turn_end()
            status = open_range(cipher, &run, places, start, stop, version, &held, missing, &refused)
            run_end(&run)
            turn_begin()
        keys.leave()
        settle(status, cells)
        return told(&refused)
    finally:
        free(refused.rows)


cdef int open_range(RecordCipher cipher, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop, uint32_t version,
                    const Held *held, const uint8_t *missing, Refused *refused) noexcept nogil:
    cdef Gcm context
    cdef uint8_t scratch[SMALL + COMMITMENT]
    cdef const uint8_t *last = NULL
    cdef const uint8_t *key
    cdef Py_ssize_t at = start, number = -1, keyed = -1, done, first = start, noted = start
    cdef bint few = 2 * held.count <= stop - start
    cdef int status = DONE
    if gcm_begin(&context, False, not few) != DONE:
        gcm_end(&context)
        return BROKEN
    while at < stop:
        status = run_row(run, at)
        if status < 0:
            break
        at += 1
        if status == FOUND and last != NULL and cipher.follows(run.item.data, run.item.size, last):
            pass                        # all that is looked at in a row is as in the one before
        elif status != FOUND or not cipher.takes(run.item.data, run.item.size) or \
                cipher.version(run.item.data) != version:
            status = DONE
            continue
        elif last == NULL or not okc_same(cipher.middle(last), cipher.middle(run.item.data), <size_t>cipher.middle_size):
            number += 1
        last = run.item.data
        if number >= held.count:
            status = CHANGED
            break
        if missing != NULL and missing[number]:
            status = REFUSED
        else:
            key = held.keys[0] + number * KEY
            if keyed == number:
                key = NULL
            status = open_row(cipher, &context, run, places, at - 1, key, cipher.middle(last), scratch)
            keyed = number
        if status < 0:
            break
        done = at - 1
        if status == REFUSED:
            status = refuse(refused, done, number if missing != NULL and missing[number] else -1)
            if status != DONE:
                break
        elif few:
            at = open_plain(cipher, &context, run, places, at, stop, last, scratch)
        elif missing == NULL:
            at = open_each(cipher, &context, run, places, at, stop, &last, held.keys[0], held.count, &number, scratch)
            keyed = number
        # Rows that follow each other are noted together.
        if done != noted:
            places.filled_run(first, noted)
            first = done
        noted = at
    if status == DONE:
        places.filled_run(first, noted)
    gcm_end(&context)
    OPENSSL_cleanse(scratch, SMALL + COMMITMENT)
    return status
