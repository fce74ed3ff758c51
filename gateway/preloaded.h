// For a library that is preloaded into one program: the processes that this one starts are started without it.

#pragma once

#include <cstdlib>
#include <cstring>

// Each of ours takes one away, and ours are the first of those named.
__attribute__((constructor)) static void not_for_children() {
    const char* named = getenv("LD_PRELOAD");
    const char* others = named ? strchr(named, ':') : nullptr;
    if (others) setenv("LD_PRELOAD", others + 1, 1);
    else unsetenv("LD_PRELOAD");
}
