# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Records of a column: sealed and opened from where they lie to where they go, with no object each.

Invariant: as in ``aead``: plaintext leaves only after its tag and its commitment verified, and every nonce is drawn in
here. A call works on a run of rows, on its own cipher context; calls on other runs may go on beside it.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from .aead cimport BROKEN, DONE, REFUSED, SMALL, RecordCipher
from .cells cimport FOUND, MISSING, Cells, find_cell
from .gcm cimport Gcm, gcm_begin, gcm_end, okc_same
from .openssl cimport *
from .places cimport Places
from .plain cimport open_plain, seal_plain
from .ring cimport BLOCK, Block, Held, KeyRing, order_block
from .run cimport CHANGED, Run, run_bind, run_end, run_nonce, run_place, run_row, run_start
from .secret cimport *
from .table cimport Table

cdef enum:
    ABSENT = 1


cdef int check_call(Cells cells, Places places, Py_ssize_t start, Py_ssize_t stop) except -1:
    places.check_range(cells.count, start, stop)
    if places.target == NULL and places.total:
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
        status = seal_range(cipher, &run, places, start, stop, data, count, shared, version, parts)
        run_end(&run)
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
    cdef Py_ssize_t at = start, used = 0, more = cipher.overhead()
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
            status = seal_row(cipher, &context, run, key, version, middles)
        elif status == MISSING:
            at += 1
            status = DONE
            continue
        if status != DONE:
            break
        used += 1
        at += 1
        if not shared:
            key += KEY
            middles += cipher.middle_size
            continue
        key = NULL
        at = seal_plain(cipher, &context, run, places, at, stop, version, middles)
        if at < 0:
            status = BROKEN
            break
    gcm_end(&context)
    return used if status == DONE else status


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
        status = seal_blocks(cipher, cells, names, &run, places, start, stop, table, &held)
        run_end(&run)
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
            key = NULL
            at = block.nexts[at]
    return DONE


# ---- opening -------------------------------------------------------------------------------------------

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
        count = gather(cipher, cells, start, stop, after, most, &version, &more, target)
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
    for at in range(start, stop):
        if (find_cell(cells.pieces, cells.firsts, &piece, at, &data, &size) != FOUND
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
    cdef Py_ssize_t status, count = 0
    cdef Py_ssize_t *refused
    check_call(cells, places, start, stop)
    if len(without) != 0 and len(without) != keys.count:
        raise invalid_error()("there must be one mark for each key")
    run_start(&run, cells, contexts, stop - start)
    refused = <Py_ssize_t *>malloc(<size_t>(stop - start + 1) * 2 * sizeof(Py_ssize_t))
    if refused == NULL:
        raise MemoryError()
    try:
        held.keys[0] = keys.enter()
        held.first, held.count, held.stride = 0, keys.count, keys.count
        if len(without) == 0:
            missing = NULL
        with nogil:
            status = open_range(cipher, &run, places, start, stop, version, &held, missing, refused, &count)
            run_end(&run)
        keys.leave()
        settle(status, cells)
        return [(refused[2 * at], refused[2 * at + 1]) for at in range(count)]
    finally:
        free(refused)


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
                    const Held *held, const uint8_t *missing, Py_ssize_t *refused, Py_ssize_t *count) noexcept nogil:
    cdef Gcm context
    cdef uint8_t scratch[SMALL + COMMITMENT]
    cdef const uint8_t *last = NULL
    cdef const uint8_t *key
    cdef Py_ssize_t at = start, number = -1, keyed = -1
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
        if status == REFUSED:
            refused[2 * count[0]] = at - 1
            refused[2 * count[0] + 1] = number if missing != NULL and missing[number] else -1
            count[0] += 1
            status = DONE
        elif few:
            at = open_plain(cipher, &context, run, places, at, stop, last, scratch)
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
    cdef Py_ssize_t status, count = 0
    cdef Py_ssize_t *refused
    check_call(cells, places, start, stop)
    if len(without) != 0 and len(without) != ring.count:
        raise invalid_error()("there must be one mark for each key")
    run_start(&run, cells, contexts, stop - start)
    refused = <Py_ssize_t *>malloc(<size_t>(stop - start + 1) * 2 * sizeof(Py_ssize_t))
    if refused == NULL:
        raise MemoryError()
    try:
        ring.enter(&held, cipher.middle_size)
        if len(without) == 0:
            missing = NULL
        with nogil:
            status = open_blocks(cipher, &run, places, start, stop, table, &held, missing, refused, &count)
            run_end(&run)
        ring.leave(len(ring.handles))
        settle(status, cells)
        return [(refused[2 * at], refused[2 * at + 1]) for at in range(count)]
    finally:
        free(refused)


cdef int open_blocks(RecordCipher cipher, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop, Table table,
                     const Held *held, const uint8_t *missing, Py_ssize_t *refused, Py_ssize_t *count) noexcept nogil:
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
                    refused[2 * count[0]] = at
                    refused[2 * count[0] + 1] = number + held.first
                    count[0] += 1
                elif missing == NULL or not missing[number]:
                    block.rows[block.count] = at
                    block.keys[block.count] = <uint32_t>number
                    block.count += 1
        if block.count == BLOCK or (at == stop - 1 and block.count):
            status = open_block(cipher, &context, run, places, &block, held, scratch, refused, count)
            block.count = 0
            if status != DONE:
                break
    gcm_end(&context)
    OPENSSL_cleanse(scratch, SMALL + COMMITMENT)
    return status


cdef int open_block(RecordCipher cipher, Gcm *context, Run *run, Places places, Block *block,
                    const Held *held, uint8_t *scratch, Py_ssize_t *refused, Py_ssize_t *count) noexcept nogil:
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
            if status < 0:
                return status
            if status == REFUSED:
                refused[2 * count[0]] = block.rows[at]
                refused[2 * count[0] + 1] = -1
                count[0] += 1
            key = NULL
            at = block.nexts[at]
    return DONE
