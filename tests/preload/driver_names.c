/* Driver level, names only, on the driver of fixtures/ that notes what is called: who gets which function, and that every argument arrives in it.
 * argv: heard | denied | off | alone (without libsire_alloc.so). */
#define _GNU_SOURCE
#include "driver.h"

typedef int (*BindMemory)(Ptr, size_t, Ptr, size_t, size_t, unsigned long long), (*BindAddress)(Ptr, size_t, Ptr, size_t, unsigned long long);
typedef int (*BindMemoryOf)(Ptr, int, size_t, Ptr, size_t, size_t, unsigned long long), (*BindAddressOf)(Ptr, int, size_t, Ptr, size_t, unsigned long long);

static const char *(*fixture_last)(void);
static void *library;

static void *by_name(const char *name) { return dlsym(library, name); }

/* The driver's function that was called last. */
#define IS_LAST(name) CHECK(!strcmp(fixture_last(), name))

static void names(int heard) {
    static const char *const table[] = {"cuMemAlloc_v2", "cuMemFree_v2", "cuMemAllocPitch_v2", "cuMemAllocManaged", "cuMemAllocAsync", "cuMemAllocAsync_ptsz",
        "cuMemFreeAsync", "cuMemFreeAsync_ptsz", "cuStreamBeginCapture_v2", "cuStreamBeginCaptureToGraph", "cuStreamBeginRecaptureToGraph", "cuMemGetAddressRange_v2", "cuGetProcAddress",
        "cuGetProcAddress_v2", "cuMulticastBindMem", "cuMulticastBindMem_v2", "cuMulticastBindAddr", "cuMulticastBindAddr_v2", "cuMemGetHandleForAddressRange"};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) CHECK(is_ours(by_name(table[i])) == heard);
    /* Other versions, other functions, other people's: never. */
    static const char *const others[] = {"cuMemAlloc", "cuMemFree", "cuStreamBeginCapture", "cuInit", "cuCtxGetCurrent", "cudnnCreate", "curl_easy_init", "cuSomethingNew"};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) CHECK(in_file(by_name(others[i]), "libcuda.so.1"));
    CHECK(((int (*)(void))by_name("cudnnCreate"))() == 11);
    /* What is not there is not there, and dlerror says so; what is there leaves no error. */
    CHECK(by_name("cuMemPoolCreate") == NULL && dlerror() != NULL);
    CHECK(by_name("cuNoSuchThing") == NULL && strstr(dlerror(), "cuNoSuchThing") != NULL);
    CHECK(by_name("cuMemAlloc_v2") != NULL && dlerror() == NULL);
    CHECK(by_name("c") == NULL && by_name("") == NULL && by_name("cu") == NULL && dlerror() != NULL);
}

static void arguments(void) {
    Ptr out = 0;
    size_t pitch = 0;
    CUDA(0, ((int (*)(Ptr *, size_t))by_name("cuMemAlloc_v2"))(&out, 5));
    IS_LAST("cuMemAlloc_v2");
    CHECK(out == 0x700000000005ull);
    CUDA(0, ((int (*)(Ptr))by_name("cuMemFree_v2"))(0x700000000007ull));
    CUDA(0, ((int (*)(Ptr *, size_t *, size_t, size_t, unsigned))by_name("cuMemAllocPitch_v2"))(&out, &pitch, 3, 4, 16));
    CHECK(out == 7 && pitch == 16);
    CUDA(0, ((int (*)(Ptr *, size_t, unsigned))by_name("cuMemAllocManaged"))(&out, 10, 1));
    CHECK(out == 11);
    CUDA(0, ((int (*)(Ptr *, size_t, void *))by_name("cuMemAllocAsync_ptsz"))(&out, 10, NULL));
    IS_LAST("cuMemAllocAsync_ptsz");
    CHECK(out == 10);
    CUDA(42, ((int (*)(Ptr, void *))by_name("cuMemFreeAsync"))(40, (void *)2));
    IS_LAST("cuMemFreeAsync");
    CUDA(0, ((int (*)(void *, void *, void *const *, const void *, size_t, int))by_name("cuStreamBeginCaptureToGraph"))((void *)1, (void *)2, (void *)3, (void *)4, 5, 6));
    CUDA(0, ((int (*)(void *, int, void *, void *, void *))by_name("cuStreamBeginRecaptureToGraph"))((void *)1, 2, (void *)3, (void *)4, (void *)5));
    CUDA(0, ((BindMemory)by_name("cuMulticastBindMem"))(1, 2, 3, 4, 5, 6));
    CUDA(0, ((BindMemoryOf)by_name("cuMulticastBindMem_v2"))(1, 7, 2, 3, 4, 5, 6));
    CUDA(0, ((BindAddress)by_name("cuMulticastBindAddr"))(1, 2, 3, 4, 5));
    CUDA(0, ((BindAddressOf)by_name("cuMulticastBindAddr_v2"))(1, 7, 2, 3, 4, 5));
    IS_LAST("cuMulticastBindAddr_v2");
    CUDA(0, ((int (*)(void *, Ptr, size_t, int, unsigned long long))by_name("cuMemGetHandleForAddressRange"))((void *)1, 2, 3, 4, 5));
    size_t size = 0;
    CUDA(0, ((int (*)(Ptr *, size_t *, Ptr))by_name("cuMemGetAddressRange_v2"))(&out, &size, 77));
    CHECK(out == 77 && size == 9);
}

/* Both calling conventions, each found the way that CUDA 11 and 12 find it. */
static void versions(int heard) {
    GetProc five = (GetProc)by_name("cuGetProcAddress_v2");
    GetProc11 four = (GetProc11)by_name("cuGetProcAddress");
    void *found = (void *)1;
    int status = -1;
    CUDA(0, five("", &found, 0, 0, NULL));
    CUDA(0, five("", NULL, 0, 0, NULL));
#define FINDS(name, version, flags, ours)                                                                              \
    do {                                                                                                               \
        void *again = NULL;                                                                                            \
        CUDA(0, four(name, &again, version, flags));                                                                   \
        CUDA(0, five(name, &found, version, flags, &status));                                                          \
        CHECK(again == found && status == 0 && is_ours(found) == (heard && (ours)));                                   \
    } while (0)
    Ptr out = 0;
    unsigned small[2] = {0, 0xABCD};
    FINDS("cuMemAlloc", 3020, 0, 1);
    CUDA(0, ((int (*)(Ptr *, size_t))found)(&out, 1));
    CHECK(out == 0x700000000001ull);
    FINDS("cuMemAlloc", 13020, 2, 1);
    /* CUDA 2's writes 32 bits: ours would write over what lies behind. */
    FINDS("cuMemAlloc", 2000, 0, 0);
    CUDA(0, ((int (*)(unsigned *, unsigned))found)(small, 3));
    CHECK(small[0] == 3 && small[1] == 0xABCD);
    FINDS("cuMemFree", 2000, 0, 0);
    FINDS("cuMemAllocAsync", 12000, 0, 1);
    CUDA(0, ((int (*)(Ptr *, size_t, void *))found)(&out, 1, NULL));
    IS_LAST("cuMemAllocAsync");
    FINDS("cuMemAllocAsync", 12000, 2, 1);
    CUDA(0, ((int (*)(Ptr *, size_t, void *))found)(&out, 1, NULL));
    IS_LAST("cuMemAllocAsync_ptsz");
    /* Without a mode, before CUDA 10.1. */
    FINDS("cuStreamBeginCapture", 10000, 0, 0);
    CUDA(0, ((int (*)(void *))found)(NULL));
    IS_LAST("cuStreamBeginCapture");
    FINDS("cuStreamBeginCapture", 12000, 0, 1);
    FINDS("cuCtxGetCurrent", 12000, 0, 0);
    FINDS("cuSomethingNew", 13000, 0, 0);
    /* The arguments changed: whoever asks for the form before gets that, also after somebody has asked for the other. Sire once answered the later versions
     * with the form before, because the name is also one that the driver exports, and called the later one with its arguments. */
    for (int again = 0; again < 2; again++) {
        static const int before[] = {12010, 13000}, since[] = {13010, 13020};
        for (int i = 0; i < 2; i++) {
            FINDS("cuMulticastBindMem", before[i], 0, 1);
            CUDA(0, ((BindMemory)found)(1, 2, 3, 4, 5, 6));
            IS_LAST("cuMulticastBindMem");
            FINDS("cuMulticastBindAddr", before[i], 0, 1);
            CUDA(0, ((BindAddress)found)(1, 2, 3, 4, 5));
            IS_LAST("cuMulticastBindAddr");
            FINDS("cuMulticastBindMem", since[i], 0, 1);
            CUDA(0, ((BindMemoryOf)found)(1, 7, 2, 3, 4, 5, 6));
            IS_LAST("cuMulticastBindMem_v2");
            FINDS("cuMulticastBindAddr", since[i], 0, 1);
            CUDA(0, ((BindAddressOf)found)(1, 7, 2, 3, 4, 5));
            IS_LAST("cuMulticastBindAddr_v2");
        }
    }
    /* A form that the table does not know is the driver's, though the name is in it. An exported name, which only some drivers take, is as by dlsym. */
    FINDS("cuMemAllocManaged", 5000, 0, 0);
    CUDA(21, ((int (*)(void))found)());
    FINDS("cuMemAllocManaged", 6000, 0, 1);
    CUDA(0, ((int (*)(Ptr *, size_t, unsigned))found)(&out, 10, 1));
    IS_LAST("cuMemAllocManaged");
    FINDS("cuMemCreate", 100000, 0, 0);
    CUDA(22, ((int (*)(void))found)());
    FINDS("cuMemFree_v2", 12000, 0, 1);
    CUDA(0, ((int (*)(Ptr))found)(0x700000000007ull));
    /* What is not there yet, and what is not there at all: since CUDA 12 the status says which, before it was one error. The answer is the driver's. */
#define FINDS_NOTHING(name, version, why)                                                                              \
    do {                                                                                                               \
        void *again = (void *)1;                                                                                       \
        found = (void *)1, status = -1;                                                                                \
        CUDA(0, five(name, &found, version, 0, &status));                                                              \
        CHECK(found == NULL && status == (why));                                                                       \
        CUDA(0, five(name, &found, version, 2, NULL));                                                                 \
        CUDA(500, four(name, &again, version, 0));                                                                     \
        CHECK(found == NULL && again == NULL);                                                                         \
    } while (0)
    FINDS_NOTHING("cuSomethingNew", 12000, 2);
    FINDS_NOTHING("cuMemAllocAsync", 11010, 2);
    FINDS_NOTHING("cuGetProcAddress", 11020, 2);
    FINDS_NOTHING("cudnnCreate", 12000, 1);
    FINDS_NOTHING("cuMemAlloc_v2", 12000, 1);
    /* What the runtime does: it switches to the one that it is given here, in the right convention. */
    FINDS("cuGetProcAddress", 12000, 0, 1);
    CUDA(0, ((GetProc)found)("cuMemAlloc", &found, 12000, 0, &status));
    CHECK(status == 0 && is_ours(found) == heard);
    FINDS("cuGetProcAddress", 11030, 0, 1);
    CUDA(0, ((GetProc11)found)("cuMemAlloc", &found, 12000, 0));
    CHECK(is_ours(found) == heard);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    watchdog();
    int heard = !strcmp(argv[1], "heard");
    library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    CHECK(library != NULL);
    fixture_last = (const char *(*)(void))dlsym(library, "fixture_last");
    CHECK(fixture_last != NULL);
    names(heard);
    arguments();
    versions(heard);
    /* Through the global order: the exported functions, whose next definition is none. Through RTLD_NEXT: nobody behind the program. */
    void *anyone = dlsym(RTLD_DEFAULT, "cuMemAlloc_v2");
    CHECK(in_file(anyone, "libsire_driver"));
    Ptr out = 0;
    CUDA(0, ((int (*)(Ptr *, size_t))anyone)(&out, 4));
    CHECK(out == 0x700000000004ull);
    return 0;
}
