// What sire_torch_malloc raises. argv: "c10" (libc10 is loaded) or "std" (only libstdc++ is). No device: memory is "short" because the
// counting runtime refuses a terabyte while this thread's regions are suspended.
#include "sire.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <new>
#include <stdexcept>
#include <string>

#define CHECK(condition)                                                                                                          \
    do {                                                                                                                          \
        if (!(condition)) {                                                                                                       \
            std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                                   \
            std::exit(1);                                                                                                         \
        }                                                                                                                         \
    } while (0)

static const ptrdiff_t HUGE_BYTES = ptrdiff_t(1) << 41;

static void raise_short(void *) { sire_torch_malloc(HUGE_BYTES, 0, nullptr); }
static void raise_bad(void *) { sire_torch_malloc(-5, 0, nullptr); }

static int with_libc10() {
    void *library = dlopen("libc10.so", RTLD_NOW | RTLD_LOCAL);
    CHECK(library != nullptr);
    auto kind = reinterpret_cast<const char *(*)(void (*)(void *), void *, char *, size_t)>(dlsym(library, "c10_kind"));
    auto alive = reinterpret_cast<int (*)()>(dlsym(library, "c10_alive"));
    CHECK(kind && alive);
    char message[2048];
    for (int i = 0; i < 1000; i++) {
        CHECK(!std::strcmp(kind(raise_short, nullptr, message, sizeof message), "c10::OutOfMemoryError"));
        CHECK(std::strstr(message, "sire_torch_malloc: CUDA out of memory. Tried to allocate 2199023255552 bytes on device 0"));
        CHECK(!std::strcmp(kind(raise_bad, nullptr, message, sizeof message), "c10::Error"));
        CHECK(std::strstr(message, "-5 bytes"));
    }
    CHECK(alive() == 0);
    return 0;
}

static int with_libstdcxx() {
    bool caught = false;
    try {
        raise_short(nullptr);
    } catch (const std::bad_alloc &error) {
        caught = std::strlen(error.what()) > 0;
    }
    CHECK(caught);
    caught = false;
    try {
        raise_bad(nullptr);
    } catch (const std::runtime_error &error) {
        caught = std::strstr(error.what(), "-5 bytes") != nullptr;
    }
    CHECK(caught);
    return 0;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    CHECK(sire_region_suspend() == SIRE_STATUS_OK);
    // What a thread with suspended regions gets comes from the runtime, and goes back there.
    void *plain = sire_torch_malloc(64, 0, nullptr);
    CHECK(plain != nullptr && !sire_owns(plain));
    sire_torch_free(plain, 64, 0, nullptr);
    CHECK(sire_torch_malloc(0, 0, nullptr) == nullptr);
    CHECK(sire_torch_pool_malloc(HUGE_BYTES, 0, nullptr) == nullptr);
    CHECK(sire_torch_pool_malloc(-5, 0, nullptr) == nullptr);
    return std::string(argv[1]) == "c10" ? with_libc10() : with_libstdcxx();
}
