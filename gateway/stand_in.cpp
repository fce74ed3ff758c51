// What Triton starts in place of its stub for Python: asks the zygote for a process that has its imports done already.
//
// Triton waits for the process it started and kills it by its number, so this one stays and stands for the stage: it
// ends when the stage does, and the stage is killed when this one ends, however it does (`pipelines/zygote.py` arranges
// for that). Where there is no zygote, or none that answers, it becomes the stub itself, as if it had never been.

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

namespace {

constexpr char SOCKET[] = "TRIPTYCH_ZYGOTE_SOCKET";
constexpr int ANSWER_MS = 5'000, TORCH_MS = 60'000;  // it may have torch to import first, and says so
constexpr char PATIENCE[] = "torch";
constexpr int SERVER = 5;  // which argument is the server's process

int connected(const char* path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address.sun_path) return -1;
    strcpy(address.sun_path, path);
    const int channel = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (channel >= 0 && connect(channel, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return channel;
    close(channel);
    return -1;
}

// A descriptor of the stage's process: it is readable once that has ended. -1 if there is none.
int forked(const std::string& arguments) {
    const char* path = getenv(SOCKET);
    if (!path) return -1;
    const int channel = connected(path);
    if (channel < 0) return -1;
    char answer[16] = {};
    const auto answered = [&](int milliseconds) {
        pollfd until{channel, POLLIN, 0};
        memset(answer, 0, sizeof answer);
        return poll(&until, 1, milliseconds) == 1 && recv(channel, answer, sizeof answer - 1, 0) > 0;
    };
    if (send(channel, arguments.data(), arguments.size(), MSG_NOSIGNAL) == ssize_t(arguments.size()) &&
        answered(ANSWER_MS) && (strcmp(answer, PATIENCE) != 0 || answered(TORCH_MS))) {
        const int stage = int(syscall(SYS_pidfd_open, atoi(answer), 0));
        if (stage >= 0 && send(channel, "1", 1, MSG_NOSIGNAL) == 1) return stage;  // the channel is the stage's life
    }
    close(channel);  // whoever is forked all the same finds nobody there, and ends
    return -1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc <= SERVER) {
        fprintf(stderr, "%s: not started by Triton\n", argv[0]);
        return 1;
    }
    std::string joined;
    std::vector<std::string> words(argv, argv + argc);
    for (const std::string& word : words) joined.append(word).push_back('\0');
    const int server = int(syscall(SYS_pidfd_open, atoi(argv[SERVER]), 0));
    if (server < 0) return 1;
    // Whoever looks for the stage shall find the stage.
    memset(argv[0], 0, argv[argc - 1] + strlen(argv[argc - 1]) - argv[0]);
    strcpy(argv[0], "triptych stand-in");

    const int stage = forked(joined);
    if (stage < 0) {
        const std::string& name = words[0];
        const std::string stub = name.substr(0, name.rfind('/') + 1) + "stub";
        std::vector<char*> given;
        for (std::string& word : words) given.push_back(word.data());
        given.push_back(nullptr);
        execv(stub.c_str(), given.data());
        fprintf(stderr, "%s: %s\n", stub.c_str(), strerror(errno));
        return 1;
    }
    pollfd ends[] = {{stage, POLLIN, 0}, {server, POLLIN, 0}};
    while (poll(ends, 2, -1) < 0 && errno == EINTR) {}
    syscall(SYS_pidfd_send_signal, stage, SIGKILL, nullptr, 0);  // of a server that has died nothing remains
    return 0;
}
