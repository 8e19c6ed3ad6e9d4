# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Turns in the interpreter, taken by the threads of one call.

Invariant: they only say when to ask for the interpreter's lock, never who has it: nothing is wrong, though slower, when
one is held for ever or by two.
"""


cdef class Turns:
    """The threads of one call; each takes part within a ``with``."""

    def __enter__(self):
        okc_turns_join(&self.shared)
        with nogil:
            okc_turn_begin()

    def __exit__(self, *raised):
        okc_turn_end()
        okc_turns_join(NULL)


cdef void turn_end() noexcept nogil:
    okc_turn_end()


cdef void turn_begin() noexcept nogil:
    okc_turn_begin()
