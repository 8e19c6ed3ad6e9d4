# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Arrow's C data and C stream interfaces in PyCapsules (Arrow specification, "The Arrow PyCapsule Interface").

Invariant: a producer's structures are held as long as what was read from them, and released once; ours keep their
buffers until the consumer releases them, which may be in any thread.
"""

from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from .secret cimport invalid_error

cdef extern from "Python.h":
    bint Py_IsInitialized() nogil

cdef enum:
    NULLABLE = 2
    MOST_BUFFERS = 1 << 20
    BUFFERS = 3
    VIEW_BUFFERS = 3                # validity, views, and at the end the sizes of those between

cdef struct ArrowSchema:
    const char *format
    const char *name
    const char *metadata
    int64_t flags
    int64_t n_children
    ArrowSchema **children
    ArrowSchema *dictionary
    void (*release)(ArrowSchema *) noexcept nogil
    void *private_data

cdef struct ArrowArray:
    int64_t length
    int64_t null_count
    int64_t offset
    int64_t n_buffers
    int64_t n_children
    const void **buffers
    ArrowArray **children
    ArrowArray *dictionary
    void (*release)(ArrowArray *) noexcept nogil
    void *private_data

cdef struct ArrowArrayStream:
    int (*get_schema)(ArrowArrayStream *, ArrowSchema *) noexcept nogil
    int (*get_next)(ArrowArrayStream *, ArrowArray *) noexcept nogil
    const char *(*get_last_error)(ArrowArrayStream *) noexcept nogil
    void (*release)(ArrowArrayStream *) noexcept nogil
    void *private_data


# ---- reading -------------------------------------------------------------------------------------------

cdef class Received:
    """An array that a stream gave; released with this."""

    cdef ArrowArray array

    def __cinit__(self):
        memset(&self.array, 0, sizeof(ArrowArray))

    def __dealloc__(self):
        if self.array.release != NULL:
            self.array.release(&self.array)


def read_array(schema, array):
    """The node of one array from its two capsules, which it holds: (format, length, offset, addresses, sizes, dictionary, owner).

    ``addresses`` are those of the buffers, 0 for none; ``sizes`` are those of a view's buffers of data, in bytes;
    ``dictionary`` is such a node or None.
    """
    cdef ArrowSchema *described = <ArrowSchema *>PyCapsule_GetPointer(schema, b"arrow_schema")
    cdef ArrowArray *read = <ArrowArray *>PyCapsule_GetPointer(array, b"arrow_array")
    if described.release == NULL or read.release == NULL:
        raise invalid_error()("the Arrow array was released before it was read")
    return node(described, read, (schema, array))


def read_stream(stream):
    """The nodes of every array of a stream's capsule."""
    cdef ArrowArrayStream *read = <ArrowArrayStream *>PyCapsule_GetPointer(stream, b"arrow_array_stream")
    cdef ArrowSchema schema
    cdef Received received
    cdef int status
    if read.release == NULL:
        raise invalid_error()("the Arrow stream was released before it was read")
    memset(&schema, 0, sizeof(ArrowSchema))
    nodes = []
    # The functions are the producer's, and may want the interpreter: it is for them to take it.
    with nogil:
        status = read.get_schema(read, &schema)
    if status != 0:
        raise invalid_error()(f"the Arrow stream gave no schema (error {status})")
    try:
        while True:
            received = Received()
            with nogil:
                status = read.get_next(read, &received.array)
            if status != 0:
                raise invalid_error()(f"the Arrow stream broke off (error {status})")
            if received.array.release == NULL:
                return nodes
            nodes.append(node(&schema, &received.array, received))
    finally:
        if schema.release != NULL:
            schema.release(&schema)


cdef object node(const ArrowSchema *schema, const ArrowArray *array, owner):
    cdef int64_t at
    cdef const int64_t *given
    if schema.format == NULL or not 0 <= array.n_buffers <= MOST_BUFFERS:
        raise invalid_error()("the Arrow array is malformed")
    if array.n_buffers and array.buffers == NULL:
        raise invalid_error()("the Arrow array is malformed")
    if (schema.dictionary == NULL) != (array.dictionary == NULL):
        raise invalid_error()("the Arrow array is malformed: it has half a dictionary")
    addresses = tuple([<uintptr_t>array.buffers[at] for at in range(array.n_buffers)])
    values = node(schema.dictionary, array.dictionary, None) if schema.dictionary != NULL else None
    format = (<bytes>schema.format).decode("utf-8", "replace")
    sizes = ()
    if format[:1] == "v" and len(addresses) > VIEW_BUFFERS and addresses[-1]:
        given = <const int64_t *>array.buffers[array.n_buffers - 1]
        sizes = tuple([given[at] for at in range(array.n_buffers - VIEW_BUFFERS)])
    return format, array.length, array.offset, addresses, sizes, values, owner


# ---- writing -------------------------------------------------------------------------------------------

cdef int64_t NO_BYTES = 0

cdef struct Exported:
    PyObject *owner
    const void *buffers[BUFFERS]


cdef void release_schema(ArrowSchema *schema) noexcept nogil:
    schema.release = NULL               # the strings are constants


cdef void release_array(ArrowArray *array) noexcept nogil:
    cdef Exported *exported = <Exported *>array.private_data
    array.release = NULL
    # An interpreter that is gone has freed the owner already.
    if Py_IsInitialized():
        with gil:
            Py_DECREF(<object>exported.owner)
    free(exported)


cdef void drop_schema(object capsule) noexcept:
    cdef ArrowSchema *schema = <ArrowSchema *>PyCapsule_GetPointer(capsule, b"arrow_schema")
    if schema.release != NULL:
        schema.release(schema)
    free(schema)


cdef void drop_array(object capsule) noexcept:
    cdef ArrowArray *array = <ArrowArray *>PyCapsule_GetPointer(capsule, b"arrow_array")
    if array.release != NULL:
        array.release(array)
    free(array)


cdef dict FORMATS = {"z": b"z", "Z": b"Z", "u": b"u", "U": b"U"}


def export_schema(str format not None):
    """A capsule with the schema of a nullable column: ``z``, ``Z``, ``u`` or ``U``."""
    cdef bytes constant = FORMATS[format]       # lives as long as the module
    cdef ArrowSchema *schema = <ArrowSchema *>calloc(1, sizeof(ArrowSchema))
    if schema == NULL:
        raise MemoryError()
    schema.format = constant
    schema.name = b""
    schema.flags = NULLABLE
    schema.release = release_schema
    try:
        return PyCapsule_New(schema, b"arrow_schema", drop_schema)
    except BaseException:
        free(schema)
        raise


def export_array(Py_ssize_t length, Py_ssize_t null_count, validity, offsets, data):
    """A capsule with an array of these buffers, validity's may be None; it holds them until it is released."""
    cdef ArrowArray *array = <ArrowArray *>calloc(1, sizeof(ArrowArray))
    cdef Exported *exported = <Exported *>calloc(1, sizeof(Exported))
    cdef const unsigned char[::1] view
    if array == NULL or exported == NULL:
        free(array)
        free(exported)
        raise MemoryError()
    views = [None if each is None else memoryview(each).cast("B") for each in (validity, offsets, data)]
    for at, each in enumerate(views):
        if each is not None and len(each):
            view = each
            exported.buffers[at] = &view[0]
        elif each is not None:
            exported.buffers[at] = &NO_BYTES    # some consumers take no null here, not even for nothing
    Py_INCREF(views)
    exported.owner = <PyObject *>views
    array.length, array.null_count, array.n_buffers = length, null_count, BUFFERS
    array.buffers = exported.buffers
    array.private_data = exported
    array.release = release_array
    try:
        return PyCapsule_New(array, b"arrow_array", drop_array)
    except BaseException:
        array.release(array)
        free(array)
        raise
