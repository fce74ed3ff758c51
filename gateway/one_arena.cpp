// Preloaded into tritonserver: one heap for all its threads.
//
// glibc gives threads heaps of their own. Triton makes threads for every load, and what a model leaves in one heap the
// next, from another, does not use again: it kept 8 to 24 kB of each load and unload, and with one heap 1 kB
// (python -m tests.loads). Requests are not slower for it: bench.stack, two rounds in turns, with it 2.29 and 2.15 times
// the bare writer at 16 streams and 2.10 and 1.76 at 64, without 1.97 and 2.25, 2.11 and 1.77.

#include <cstdlib>

#include <malloc.h>

#include "preloaded.h"

__attribute__((constructor)) static void one_arena() {
    if (!getenv("MALLOC_ARENA_MAX")) mallopt(M_ARENA_MAX, 1);
}
