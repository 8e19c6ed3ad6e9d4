/* SPDX-License-Identifier: Apache-2.0
 * What hot_loops.py tells callgrind, by ctypes: count from here, and write what was counted under a name. Outside of valgrind
 * these do nothing.
 */
#include <valgrind/callgrind.h>

void counting_start(void)
{
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}

void counting_stop(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
    CALLGRIND_STOP_INSTRUMENTATION;
}
