// Preloaded into tritonserver: one heap for all its threads.
//
// glibc gives threads heaps of their own. Triton makes threads for every load, and what a model leaves in one heap the
// next, from another, does not use again: it kept 8 to 24 kB of each load and unload, and with one heap 1 kB. Requests
// are not slower for it (python -m bench.stack, docs/performance.md).

#include <cstdlib>

#include <malloc.h>

#include "preloaded.h"

__attribute__((constructor)) static void one_arena() {
    if (!getenv("MALLOC_ARENA_MAX")) mallopt(M_ARENA_MAX, 1);
}
