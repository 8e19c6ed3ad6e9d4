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
from .ring cimport BLOCK, Block, Held, KeyRing, order_block
from .run cimport CHANGED, Run, run_bind, run_end, run_nonce, run_place, run_row, run_start
from .secret cimport *
from .table cimport Table
from .turns cimport turn_begin, turn_end

cdef enum:
    ABSENT = 1
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


cdef inline int seal_row(RecordCipher cipher, Gcm *context, Run *run, const uint8_t *key, uint32_t version,
                         const uint8_t *middle) noexcept nogil:
    """Seal the row that the item points at. A null key is that before."""
    cdef const uint8_t *nonce = run_nonce(run)
    if nonce == NULL or run_bind(run, cipher, middle, key != NULL) != DONE:
        return BROKEN
    return cipher.seal_bound(context, key, nonce, version, middle, &run.item, run.aad, run.aad_size)


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


# ---- rows that share keys --------------------------------------------------------------------------------

def seal_named(RecordCipher cipher not None, Cells cells not None, contexts, Places places not None, Py_ssize_t start,
               Py_ssize_t stop, Table table not None, Cells names not None, KeyRing ring not None):
    """Seal those of a run of rows whose name's key is on the ring."""
    cdef Run run
    cdef Held held
    cdef Py_ssize_t status
    check_call(cells, places, start, stop)
    if names.count != cells.count:
        raise invalid_error()("there must be one name for each record")
    run_start(&run, cells, contexts, stop - start)
    ring.enter(&held, cipher.middle_size)
    with nogil:
        turn_end()
        status = seal_blocks(cipher, cells, names, &run, places, start, stop, table, &held)
        run_end(&run)
        turn_begin()
    ring.leave(len(ring.handles))
    settle(status, cells)


cdef int seal_blocks(RecordCipher cipher, Cells cells, Cells names, Run *run, Places places, Py_ssize_t start,
                     Py_ssize_t stop, Table table, const Held *held) noexcept nogil:
    cdef Gcm context
    cdef Block block
    cdef const uint8_t *data = NULL
    cdef Py_ssize_t at, number, size = 0, piece = 0, other = 0
    cdef int status = DONE
    if gcm_begin(&context, True, False) != DONE:
        gcm_end(&context)
        return BROKEN
    block.count = 0
    for at in range(start, stop):
        if not cells.nulls or find_cell(cells.pieces, cells.firsts, &piece, at, &data, &size) == FOUND:
            number = -1
            if find_cell(names.pieces, names.firsts, &other, at, &data, &size) == FOUND:
                number = table.find(data, size)
            if number < 0:
                status = CHANGED
                break
            if held.first <= number < held.first + held.count:
                block.rows[block.count] = at
                block.keys[block.count] = <uint32_t>(number - held.first)
                block.count += 1
        if block.count == BLOCK or (at == stop - 1 and block.count):
            status = seal_block(cipher, &context, run, places, &block, held)
            block.count = 0
            if status != DONE:
                break
    gcm_end(&context)
    return status


cdef int seal_block(RecordCipher cipher, Gcm *context, Run *run, Places places, Block *block,
                    const Held *held) noexcept nogil:
    cdef const uint8_t *key
    cdef const uint8_t *middle
    cdef Py_ssize_t handle, position
    cdef int chain, at, status
    order_block(block)
    for chain in range(block.chain_count):
        at = block.heads[block.chains[chain]]
        handle = <Py_ssize_t>block.keys[at] // held.stride
        position = <Py_ssize_t>block.keys[at] % held.stride
        key = held.keys[handle] + position * KEY
        middle = held.middles[handle] + position * cipher.middle_size
        while at >= 0:
            status = run_row(run, block.rows[at])
            if status == FOUND:
                status = run_place(run, places, block.rows[at], run.item.size + cipher.overhead())
            if status != FOUND:
                return CHANGED if status == MISSING else status
            if seal_row(cipher, context, run, key, 0, middle) != DONE:
                return BROKEN
            places.filled(block.rows[at])
            key = NULL
            at = block.nexts[at]
    return DONE


# ---- opening -------------------------------------------------------------------------------------------

cdef struct Refused:
    # Pairs of a row that did not verify and -1, or of one whose key is not there and the key's number.
    Py_ssize_t *rows
    Py_ssize_t count, room


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
        return [(refused.rows[2 * at], refused.rows[2 * at + 1]) for at in range(refused.count)]
    finally:
        free(refused.rows)


cdef inline int open_row(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t at,
                         const uint8_t *key, const uint8_t *middle, uint8_t *scratch) noexcept nogil:
    """Open the row that the item points at; its place is zeroed unless it verifies. A null key is that before."""
    cdef Py_ssize_t size = run.item.size - cipher.overhead()
    cdef int status = run_place(run, places, at, size)
    if status != FOUND:
        return status
    if run_bind(run, cipher, middle, key != NULL) != DONE:
        return BROKEN
    status = cipher.open_bound(context, key, &run.item, scratch, run.aad, run.aad_size)
    if status == REFUSED:
        memset(run.item.output, 0, <size_t>size)
    return status


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


def open_named(RecordCipher cipher not None, Cells cells not None, contexts, Places places not None, Py_ssize_t start,
               Py_ssize_t stop, Table table not None, KeyRing ring not None, bytes without not None):
    """Open those of this cipher's records whose key is on the ring; gives what ``open_rows`` does, with numbers of the
    table.

    ``without`` is empty, or has a byte for each key of the ring: 1 for one that is not there, 2 for one whose rows are
    not to be looked at.
    """
    cdef Run run
    cdef Held held
    cdef const uint8_t *missing = without
    cdef Py_ssize_t status, at
    cdef Refused refused
    check_call(cells, places, start, stop)
    if len(without) != 0 and len(without) != ring.count:
        raise invalid_error()("there must be one mark for each key")
    run_start(&run, cells, contexts, stop - start)
    memset(&refused, 0, sizeof(refused))
    try:
        ring.enter(&held, cipher.middle_size)
        if len(without) == 0:
            missing = NULL
        with nogil:
            turn_end()
            status = open_blocks(cipher, &run, places, start, stop, table, &held, missing, &refused)
            run_end(&run)
            turn_begin()
        ring.leave(len(ring.handles))
        settle(status, cells)
        return [(refused.rows[2 * at], refused.rows[2 * at + 1]) for at in range(refused.count)]
    finally:
        free(refused.rows)


cdef int open_blocks(RecordCipher cipher, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop, Table table,
                     const Held *held, const uint8_t *missing, Refused *refused) noexcept nogil:
    cdef Gcm context
    cdef Block block
    cdef uint8_t scratch[SMALL + COMMITMENT]
    cdef const uint8_t *data = NULL
    cdef Py_ssize_t at, number, size = 0, piece = 0
    cdef int status = DONE
    if gcm_begin(&context, False, False) != DONE:
        gcm_end(&context)
        return BROKEN
    block.count = 0
    for at in range(start, stop):
        if (find_cell(run.pieces, run.firsts, &piece, at, &data, &size) == FOUND and cipher.takes(data, size)
                and cipher.version(data) == 0):
            number = table.find(cipher.middle(data), cipher.middle_size)
            if number < 0:
                status = CHANGED
                break
            number -= held.first
            if 0 <= number < held.count:
                if missing != NULL and missing[number] == ABSENT:
                    if refuse(refused, at, number + held.first) != DONE:
                        status = BROKEN
                        break
                    places.filled(at)
                elif missing == NULL or not missing[number]:
                    block.rows[block.count] = at
                    block.keys[block.count] = <uint32_t>number
                    block.count += 1
        if block.count == BLOCK or (at == stop - 1 and block.count):
            status = open_block(cipher, &context, run, places, &block, held, scratch, refused)
            block.count = 0
            if status != DONE:
                break
    gcm_end(&context)
    OPENSSL_cleanse(scratch, SMALL + COMMITMENT)
    return status


cdef int open_block(RecordCipher cipher, Gcm *context, Run *run, Places places, Block *block,
                    const Held *held, uint8_t *scratch, Refused *refused) noexcept nogil:
    cdef const uint8_t *key
    cdef const uint8_t *middle
    cdef Py_ssize_t handle, position
    cdef int chain, at, status
    order_block(block)
    for chain in range(block.chain_count):
        at = block.heads[block.chains[chain]]
        handle = <Py_ssize_t>block.keys[at] // held.stride
        position = <Py_ssize_t>block.keys[at] % held.stride
        key = held.keys[handle] + position * KEY
        middle = held.middles[handle] + position * cipher.middle_size
        while at >= 0:
            status = run_row(run, block.rows[at])
            if status != FOUND or not cipher.takes(run.item.data, run.item.size):
                return BROKEN if status == BROKEN else CHANGED
            status = open_row(cipher, context, run, places, block.rows[at], key, middle, scratch)
            if status < 0 or (status == REFUSED and refuse(refused, block.rows[at], -1) != DONE):
                return status if status < 0 else BROKEN
            places.filled(block.rows[at])
            key = NULL
            at = block.nexts[at]
    return DONE
