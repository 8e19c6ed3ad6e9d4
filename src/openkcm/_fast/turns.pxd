# SPDX-License-Identifier: Apache-2.0
cdef extern from "turns.h" nogil:
    ctypedef struct Shared "okc_turns":
        pass
    void okc_turns_join(Shared *turns)
    void okc_turn_end()
    void okc_turn_begin()

cdef class Turns:
    cdef Shared shared

# First and last in what is done without the interpreter's lock; nothing in a thread that takes no turns.
cdef void turn_end() noexcept nogil
cdef void turn_begin() noexcept nogil
