// Preloaded into Triton's stub for Python: it becomes the zygote, from which stages are forked with their imports done.
//
// Before the stub's own `main` runs, Python is started as the stub would start it, and `pipelines/zygote.py` runs in it.
// That returns in a forked process only, having said by `triptych_become` what that one is: there the stub's `main`
// goes on with those arguments, and is told that Python has yet to be started, which then costs nothing. Knows of the
// stub only that it starts Python once (pybind11, `initialize_interpreter`), and nothing of Triton.

#include <cstring>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "preloaded.h"

namespace {

using Main = int (*)(int, char**, char**);

// cpython's PyStatus, and the first fields of its PyConfig, the same from 3.8 to 3.13; the whole has some 500 bytes.
struct Status {
    int type;
    const char *function, *message;
    int exit_code;
};
struct Config {
    int kind, isolated, use_environment, dev_mode, install_signal_handlers;
    char rest[8192];
};

Main stub_main = nullptr;
char* title = nullptr;  // where ps reads the arguments of this process
size_t title_size = 0;
bool shall_start = false;  // the stub believes that it has Python to start
std::string arguments;

template <typename Function>
Function next(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

void show(const char* text, size_t size) {
    memset(title, 0, title_size);
    memcpy(title, text, size < title_size ? size : title_size - 1);
}

}  // namespace

extern "C" {

void PyConfig_InitIsolatedConfig(Config*);
void PyConfig_Clear(Config*);
int PyRun_SimpleString(const char*);

// From now on this process is the stub with these arguments, each with a zero byte at its end.
void triptych_become(const char* given, size_t size) {
    arguments.assign(given, size);
    show(given, size);
}

int Py_IsInitialized() {
    static const auto real = next<int (*)()>("Py_IsInitialized");
    return shall_start ? 0 : real();
}

Status Py_InitializeFromConfig(const Config* config) {
    static const auto real = next<Status (*)(const Config*)>("Py_InitializeFromConfig");
    if (!shall_start) return real(config);
    shall_start = false;
    return {};
}
}

static int zygote(int argc, char** argv, char** environment) {
    title = argv[0];
    title_size = size_t(argv[argc - 1] + strlen(argv[argc - 1]) + 1 - argv[0]);
    const std::string program = argv[0];
    show("triptych zygote", 15);
    static Config config;
    PyConfig_InitIsolatedConfig(&config);
    config.isolated = 0;
    config.use_environment = 1;
    config.install_signal_handlers = 1;
    const Status status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (status.type != 0) return 1;
    // A stage ends when its `atexit` functions have run, the first registered last. To take Python apart after them
    // writes into all the memory that is shared with the zygote: 1.4 s of generate's unload.
    const char* const program_text =
        "import atexit, os\n"
        "atexit.register(os._exit, 0)\n"
        "atexit.register(print, end='', flush=True)\n"
        "from pipelines import zygote\n"
        "zygote.serve()\n";
    if (PyRun_SimpleString(program_text) != 0 || arguments.empty()) return 1;

    std::vector<char*> words;
    for (size_t at = 0; at < arguments.size(); at += strlen(&arguments[at]) + 1) words.push_back(&arguments[at]);
    words.push_back(nullptr);
    shall_start = true;
    return stub_main(int(words.size()) - 1, words.data(), environment);
}

extern "C" int __libc_start_main(
    Main main, int argc, char** argv, void (*init)(), void (*fini)(), void (*linker_fini)(), void* stack) {
    using Start = int (*)(Main, int, char**, void (*)(), void (*)(), void (*)(), void*);
    stub_main = main;
    return next<Start>("__libc_start_main")(zygote, argc, argv, init, fini, linker_fini, stack);
}
