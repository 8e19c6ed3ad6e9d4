# SPDX-License-Identifier: Apache-2.0
"""Arrow's C data and C stream interfaces for the Python backend, through ctypes; as ``_fast.arrow``.

Invariant: a producer's structures are held as long as what was read from them, and released once; ours keep their
buffers until the consumer releases them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from ..errors import InvalidInput
from .pure_records import address_of

_NULLABLE: Final = 2
_MOST_BUFFERS: Final = 1 << 20
_VIEW_BUFFERS: Final = 3
_FORMATS: Final = {"z": b"z", "Z": b"Z", "u": b"u", "U": b"U"}

_Release = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Schema(ctypes.Structure):
    pass


_Schema._fields_ = [
    ("format", ctypes.c_char_p),
    ("name", ctypes.c_char_p),
    ("metadata", ctypes.c_char_p),
    ("flags", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("children", ctypes.c_void_p),
    ("dictionary", ctypes.POINTER(_Schema)),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]


class _Array(ctypes.Structure):
    pass


_Array._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.c_void_p),
    ("dictionary", ctypes.POINTER(_Array)),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]


class _Stream(ctypes.Structure):
    _fields_ = (
        ("get_schema", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)),
        ("get_next", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)),
        ("get_last_error", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("private_data", ctypes.c_void_p),
    )


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
# A capsule that is going has no references left, and must not become an object again on the way.
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


# ---- reading -------------------------------------------------------------------------------------------


class _Received:
    """An array that a stream gave, or its schema; released with this."""

    def __init__(self, kind: type[_Schema] | type[_Array]) -> None:
        self.structure: Any = kind()

    def __del__(self) -> None:
        if self.structure.release:
            _Release(self.structure.release)(ctypes.addressof(self.structure))


def read_array(schema: Any, array: Any) -> tuple[Any, ...]:
    """The node of one array from its capsules, which it holds: (format, length, offset, addresses, sizes, dictionary,
    owner).

    ``addresses`` are those of the buffers, 0 for none; ``sizes`` are those of a view's buffers of data, in bytes;
    ``dictionary`` is such a node or None.
    """
    described = _Schema.from_address(_pointer_of(schema, b"arrow_schema"))
    read = _Array.from_address(_pointer_of(array, b"arrow_array"))
    if not described.release or not read.release:
        raise InvalidInput("the Arrow array was released before it was read")
    return _node(described, read, (schema, array))


def read_stream(stream: Any) -> list[tuple[Any, ...]]:
    """The nodes of every array of a stream's capsule."""
    place = _pointer_of(stream, b"arrow_array_stream")
    read = _Stream.from_address(place)
    if not read.release:
        raise InvalidInput("the Arrow stream was released before it was read")
    schema = _Received(_Schema)
    status = read.get_schema(place, ctypes.addressof(schema.structure))
    if status:
        raise InvalidInput(f"the Arrow stream gave no schema (error {status})")
    nodes: list[tuple[Any, ...]] = []
    while True:
        received = _Received(_Array)
        status = read.get_next(place, ctypes.addressof(received.structure))
        if status:
            raise InvalidInput(f"the Arrow stream broke off (error {status})")
        if not received.structure.release:
            return nodes
        nodes.append(_node(schema.structure, received.structure, received))


def _node(schema: Any, array: Any, owner: Any) -> tuple[Any, ...]:
    if schema.format is None or not 0 <= array.n_buffers <= _MOST_BUFFERS:
        raise InvalidInput("the Arrow array is malformed")
    if array.n_buffers and not array.buffers:
        raise InvalidInput("the Arrow array is malformed")
    if bool(schema.dictionary) != bool(array.dictionary):
        raise InvalidInput("the Arrow array is malformed: it has half a dictionary")
    addresses = tuple(array.buffers[at] or 0 for at in range(array.n_buffers))
    values = _node(schema.dictionary[0], array.dictionary[0], None) if schema.dictionary else None
    kind = schema.format.decode("utf-8", "replace")
    sizes: tuple[int, ...] = ()
    if kind.startswith("v") and len(addresses) > _VIEW_BUFFERS and addresses[-1]:
        sizes = tuple((ctypes.c_int64 * (len(addresses) - _VIEW_BUFFERS)).from_address(addresses[-1]))
    return kind, array.length, array.offset, addresses, sizes, values, owner


# ---- writing -------------------------------------------------------------------------------------------

_exported: Final[dict[int, Any]] = {}
"""What consumers have not released yet, by the address of its structure."""


def _callback(function: Callable[[int], None]) -> Any:
    return _Release(function)


@_callback
def _release_schema(place: int) -> None:
    _Schema.from_address(place).release = None


@_callback
def _release_array(place: int) -> None:
    array = _Array.from_address(place)
    array.release = None
    _exported.pop(array.private_data, None)


def _drop(capsule: int, name: bytes, kind: type[_Schema] | type[_Array]) -> None:
    """Free a capsule's structure, and release it unless a consumer took it over."""
    place = _pointer_in(capsule, name)
    structure: Any = kind.from_address(place)
    if structure.release:
        _Release(structure.release)(place)
    _exported.pop(place, None)


@_callback
def _drop_schema(capsule: int) -> None:
    _drop(capsule, b"arrow_schema", _Schema)


@_callback
def _drop_array(capsule: int) -> None:
    _drop(capsule, b"arrow_array", _Array)


def export_schema(format: str) -> object:  # noqa: A002 - the native backend's name
    """A capsule with the schema of a nullable column: ``z``, ``Z``, ``u`` or ``U``."""
    schema = _Schema()
    schema.format, schema.name, schema.flags = _FORMATS[format], b"", _NULLABLE
    schema.release = ctypes.cast(_release_schema, ctypes.c_void_p)
    place = ctypes.addressof(schema)
    _exported[place] = schema
    capsule: object = _new_capsule(place, b"arrow_schema", ctypes.cast(_drop_schema, ctypes.c_void_p))
    return capsule


def export_array(length: int, null_count: int, validity: Any, offsets: Any, data: Any) -> object:
    """A capsule with an array of these buffers, validity's may be None; it holds them until it is released."""
    pointers = (ctypes.c_void_p * 3)()
    held: list[Any] = [pointers]
    for at, each in enumerate((validity, offsets, data)):
        if each is not None:
            # Some consumers take no null here, not even for nothing.
            view = memoryview(each if memoryview(each).nbytes else bytes(8))
            held.append(view)
            pointers[at] = address_of(view)
    array = _Array()
    array.length, array.null_count, array.n_buffers = length, null_count, len(pointers)
    array.buffers = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
    # A consumer moves the structure elsewhere; what it points to is known by the pointers' own address.
    array.private_data = ctypes.addressof(pointers)
    array.release = ctypes.cast(_release_array, ctypes.c_void_p)
    _exported[ctypes.addressof(pointers)] = held
    place = ctypes.addressof(array)
    _exported[place] = array
    capsule: object = _new_capsule(place, b"arrow_array", ctypes.cast(_drop_array, ctypes.c_void_p))
    return capsule
