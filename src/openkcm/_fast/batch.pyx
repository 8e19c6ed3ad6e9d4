# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""The inputs of one call, pinned, and its outputs, allocated to their exact sizes.

Invariant: what is pinned belongs to objects that the batch holds, so that no pointer outlives its bytes whatever the
caller does to its lists meanwhile.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM, PyList_New, PyList_SET_ITEM
from cpython.memoryview cimport PyMemoryView_GET_BUFFER
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from .secret cimport invalid_error, limit_error

cdef enum:
    PARALLEL_ITEMS = 16             # below these two, releasing the GIL costs more than it gives
    PARALLEL_BYTES = 16384
    ARENA = 1048576                 # CPython's unit of taking memory from the system, since 3.10
    POOLED = 512                    # larger objects do not come from an arena
    BYTES_HEAD = 48
    ANCHORS = 8                     # at most 8 MiB kept
    LARGE = 4194304                 # from here on a result surely holds a large page
    MAX_SORTED = 2147483647
    MAX_BOUND = 1073741824          # associated data; with what is put before it, its size still fits an int


cdef int pin(object thing, const uint8_t **data, Py_ssize_t *size, list held, Py_ssize_t index) except -1:
    """Point at a bytes-like object's bytes; anything but exact bytes is held through a memoryview."""
    if PyBytes_CheckExact(thing):
        data[0] = <const uint8_t *>PyBytes_AS_STRING(thing)
        size[0] = PyBytes_GET_SIZE(thing)
        return 0
    try:
        view = memoryview(thing)
        if not view.c_contiguous:
            raise BufferError()
    except (TypeError, ValueError, BufferError):
        raise invalid_error()(_not_bytes(thing), index=None if index == ALONE else index) from None
    held.append(view)
    data[0] = <const uint8_t *>PyMemoryView_GET_BUFFER(view).buf
    size[0] = PyMemoryView_GET_BUFFER(view).len
    return 0


cdef int bound_size(bytes aad) except -1:
    """The size of associated data. Callers limit it to far less: this keeps a larger one from wrapping round."""
    if PyBytes_GET_SIZE(aad) > MAX_BOUND:
        raise limit_error()(f"a context has at most {MAX_BOUND} bytes")
    return <int>PyBytes_GET_SIZE(aad)


cdef str _not_bytes(thing):
    if isinstance(thing, memoryview):
        return "a buffer must be contiguous, and not released"
    if isinstance(thing, str):
        return "bytes are wanted, not str; encode the text first, for example with .encode()"
    return f"bytes-like data is wanted, not {type(thing).__name__}"


cdef class Batch:
    """The pinned inputs and outputs of one call; lives on the stack of that call only."""

    def __cinit__(self, inputs, contexts, index, Py_ssize_t keys):
        self.held = []
        self.inputs = list(inputs)              # our own references: the caller's list may change meanwhile
        self.count = len(self.inputs)
        self.items = <Item *>malloc(<size_t>(self.count if self.count else 1) * sizeof(Item))
        if self.items == NULL:
            raise MemoryError()
        self.pin_inputs()
        self.pin_contexts(contexts)
        self.pin_keys(index, keys)
        self.brief = 2 * keys > self.count

    def __dealloc__(self):
        free(self.items)
        free(self.order)

    cdef int pin_inputs(self) except -1:
        cdef Py_ssize_t at
        self.total = 0
        for at in range(self.count):
            pin(<object>PyList_GET_ITEM(self.inputs, at), &self.items[at].data, &self.items[at].size, self.held, at)
            self.total += self.items[at].size
        return 0

    cdef int pin_contexts(self, contexts) except -1:
        cdef Py_ssize_t at
        cdef bytes one
        cdef int size
        if isinstance(contexts, bytes):
            one = contexts
            size = bound_size(one)
            self.contexts = one
            for at in range(self.count):
                self.items[at].context = <const uint8_t *>PyBytes_AS_STRING(one)
                self.items[at].context_size = size
            return 0
        self.contexts = list(contexts)
        if len(self.contexts) != self.count:
            raise invalid_error()("there must be one context for each record")
        for at in range(self.count):
            one = <bytes?>self.contexts[at]
            self.items[at].context = <const uint8_t *>PyBytes_AS_STRING(one)
            self.items[at].context_size = bound_size(one)
        return 0

    cdef int pin_keys(self, index, Py_ssize_t keys) except -1:
        cdef Py_ssize_t at
        cdef const uint32_t[::1] positions
        if index is None:
            if keys != 1 and keys != self.count:
                raise invalid_error()("there must be one key, a key for each record, or an index")
            for at in range(self.count):
                self.items[at].key = 0 if keys == 1 else <uint32_t>at
            return 0
        positions = index
        self.index = index
        if positions.shape[0] != self.count:
            raise invalid_error()("there must be one key position for each record")
        for at in range(self.count):
            if positions[at] >= keys:
                raise invalid_error()("no key at that position", index=at)
            self.items[at].key = positions[at]
        return self.sort_by_key(keys)

    cdef int sort_by_key(self, Py_ssize_t keys) except -1:
        """Let records of one key follow each other: setting a key costs nearly as much as a small record."""
        cdef Py_ssize_t at
        cdef uint32_t *next_place
        cdef uint32_t place = 0, size
        if self.count < PARALLEL_ITEMS or self.count > MAX_SORTED or keys > self.count:
            return 0
        next_place = <uint32_t *>calloc(<size_t>keys, sizeof(uint32_t))
        self.order = <uint32_t *>malloc(<size_t>self.count * sizeof(uint32_t))
        if next_place == NULL or self.order == NULL:
            free(next_place)
            raise MemoryError()
        for at in range(self.count):
            next_place[self.items[at].key] += 1
        for at in range(keys):
            size = next_place[at]
            next_place[at] = place
            place += size
        for at in range(self.count):
            self.order[next_place[self.items[at].key]] = <uint32_t>at
            next_place[self.items[at].key] += 1
        free(next_place)
        return 0

    cdef bint parallel(self) noexcept:
        return self.count >= PARALLEL_ITEMS or self.total >= PARALLEL_BYTES

    cdef list allocate(self, Py_ssize_t more):
        """One bytes object for each record, ``more`` longer (or shorter) than its input."""
        cdef list outputs = PyList_New(self.count)
        cdef Py_ssize_t at, since = 0
        cdef bytes output
        for at in range(self.count):
            if self.items[at].size + more + BYTES_HEAD <= POOLED:
                since += self.items[at].size + more + BYTES_HEAD
            if since > ARENA:
                since = 0
                anchor(self.items[at].size + more)
            output = PyBytes_FromStringAndSize(NULL, self.items[at].size + more)
            self.items[at].output = <uint8_t *>PyBytes_AS_STRING(output)
            Py_INCREF(output)
            PyList_SET_ITEM(outputs, at, output)
        if self.total >= LARGE:
            with nogil:
                self.enlarge(more)
        return outputs

    cdef void enlarge(self, Py_ssize_t more) noexcept nogil:
        """Have large outputs that lie side by side in large pages."""
        cdef okc_span span
        cdef Py_ssize_t at
        memset(&span, 0, sizeof(span))
        for at in range(self.count):
            okc_span_add(&span, self.items[at].output, <size_t>(self.items[at].size + more))
        okc_span_end(&span)


cdef bytes new_output(Py_ssize_t size):
    """A bytes object for one result, of any size."""
    cdef bytes output
    cdef size_t start
    cdef int begun
    if size < LARGE:
        return PyBytes_FromStringAndSize(NULL, size)
    begun = okc_heap_begin(<size_t>size)
    try:
        output = PyBytes_FromStringAndSize(NULL, size)
    finally:
        okc_heap_end(begun)
    start = <size_t>PyBytes_AS_STRING(output)
    okc_enlarge(start, start + <size_t>size, False)
    return output


cdef object place_output(Item *item, Py_ssize_t size, out, list held):
    """Point at where one result goes: fresh bytes, which this gives, or a buffer, of which it gives what is written."""
    cdef bytes output
    if out is None:
        output = new_output(size)
        item.output = <uint8_t *>PyBytes_AS_STRING(output)
        return output
    try:
        view = memoryview(out)
    except (TypeError, ValueError, BufferError):
        raise invalid_error()(f"out is a writable buffer, not {type(out).__name__}") from None
    if view.readonly or not view.c_contiguous:
        raise invalid_error()("out must be writable and contiguous")
    if view.nbytes < size:
        raise invalid_error()(f"the result takes {size} bytes and out has {view.nbytes}")
    held.append(view)
    item.output = <uint8_t *>PyMemoryView_GET_BUFFER(view).buf
    if item.size and item.output < item.data + item.size and item.data < item.output + <Py_ssize_t>view.nbytes:
        raise invalid_error()("out overlaps what is read")
    return size


cdef list anchors = []


cdef int anchor(Py_ssize_t size) except -1:
    """Hold a byte in one more of the interpreter's arenas, up to a few.

    CPython unmaps an arena (1 MiB) when its last object goes. A caller that encrypts batch after batch
    would fault every page of its results anew, which costs half as much as the cipher.
    """
    if len(anchors) < ANCHORS:
        anchors.append(PyBytes_FromStringAndSize(NULL, size))
    return 0
