/* Driver-level hooks beside others, on the software device. argv:
 *   company           beside fixtures/company.c: prints what was Sire's and what the other one heard
 *   chain             beside two copies of fixtures/chain.c
 *   two LIB LIB       two libraries with their own ways to the driver: what one allocates, the other frees
 *   lists LIB LIB OWN two of them by the lists of file names: the first is heard, the second is not, and the program's own calls as OWN says (1, 0)
 *   early KIND        behind fixtures/early.c in a region of the whole process: its driver calls are heard (1) or not (0)
 *   copies LIB LIB    two libraries with a CUDA runtime of their own inside, and the program's own runtime
 *   threads           look-ups, allocations and pauses at once */
#define _GNU_SOURCE
#include "driver.h"
#include <pthread.h>

static void with_context(void) {
    void *context = NULL;
    CUDA(0, cuInit(0));
    CUDA(0, cuDevicePrimaryCtxRetain(&context, 0));
    CUDA(0, cuCtxSetCurrent(context));
}

static int heard(const char *counter) {
    int (*count)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, counter);
    CHECK(count != NULL);
    return count();
}

static void *driver_function(const char *name) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW), *found = library ? dlsym(library, name) : NULL;
    CHECK(found != NULL);
    return found;
}

/* One way to allocate, outside and inside the region: whose it is, and how often the other library heard of it. */
#define REPORT(label, counter, alloc, release)                                                                         \
    for (int inside = 0; inside < 2; inside++) {                                                                       \
        Ptr ptr = 0;                                                                                                   \
        int before = heard(counter);                                                                                   \
        if (inside) OK(sire_region_enter(region, 0));                                                                  \
        CUDA(0, alloc);                                                                                                \
        if (inside) OK(sire_region_leave(region));                                                                     \
        printf("%s %s owned=%d heard=%d\n", label, inside ? "inside" : "outside", sire_owns((void *)(uintptr_t)ptr), heard(counter) - before); \
        CUDA(0, release);                                                                                              \
        CHECK(cudaGetLastError() == 0);                                                                                \
    }

static void company(uint32_t region) {
    int (*alloc)(Ptr *, size_t) = (int (*)(Ptr *, size_t))driver_function("cuMemAlloc_v2");
    int (*release)(Ptr) = (int (*)(Ptr))driver_function("cuMemFree_v2");
    int live = -1;
    OK(sire_driver_hook_probe(&live));
    printf("live=%d\n", live);
    REPORT("runtime", "company_runtime", cudaMalloc((void **)&ptr, MiB), cudaFree((void *)(uintptr_t)ptr));
    REPORT("linked", "company_driver", cuMemAlloc_v2(&ptr, MiB), cuMemFree_v2(ptr));
    REPORT("found", "company_driver", alloc(&ptr, MiB), release(ptr));
    /* What fails is the runtime's own error, however many have passed the call on. */
    void *none = NULL;
    int before = heard("company_runtime");
    CUDA(2, cudaMalloc(&none, (size_t)1 << 45));
    CHECK(none == NULL && heard("company_runtime") == before + 1);
    CUDA(2, cudaGetLastError());
    CUDA(0, cudaGetLastError());
}

static void two(uint32_t region, char **paths) {
    Find find[2];
    for (int i = 0; i < 2; i++) {
        find[i] = (Find)dlsym(dlopen(paths[i], RTLD_NOW | RTLD_LOCAL), "private_find");
        CHECK(find[i] != NULL);
    }
    for (int i = 0; i < 2; i++) {
        int (*alloc)(Ptr *, size_t) = (int (*)(Ptr *, size_t))find[i]("cuMemAlloc_v2", "cuMemAlloc", 12000, 0);
        int (*release)(Ptr) = (int (*)(Ptr))find[1 - i]("cuMemFree_v2", "cuMemFree", 12000, 0);
        Ptr ours = 0, plain = 0;
        CUDA(0, alloc(&plain, 2 * MiB));
        OK(sire_region_enter(region, 0));
        CUDA(0, alloc(&ours, 2 * MiB));
        OK(sire_region_leave(region));
        CHECK(sire_owns((void *)(uintptr_t)ours) && !sire_owns((void *)(uintptr_t)plain));
        CUDA(0, release(ours));
        CUDA(0, release(plain));
        CUDA(1, release(plain));
    }
}

/* A library with a runtime of its own, which nobody else can name (fixtures/copy.c). */
typedef struct {
    int (*malloc)(void **, size_t), (*free)(void *), (*malloc_async)(void **, size_t, void *), (*free_async)(void *, void *), (*last_error)(void);
} Copy;

static Copy copy_of(const char *path) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) fprintf(stderr, "%s\n", dlerror());
    CHECK(library != NULL && !in_file(dlsym(library, "cudaMalloc"), "copy_"));
    Copy copy;
    *(void **)&copy.malloc = dlsym(library, "copy_malloc"), *(void **)&copy.free = dlsym(library, "copy_free");
    *(void **)&copy.malloc_async = dlsym(library, "copy_malloc_async"), *(void **)&copy.free_async = dlsym(library, "copy_free_async");
    *(void **)&copy.last_error = dlsym(library, "copy_last_error");
    CHECK(copy.malloc && copy.free && copy.malloc_async && copy.free_async && copy.last_error);
    return copy;
}

/* What one runtime's copy allocates in a region is the region's, whichever frees it. Each keeps its own last error. */
static void copies(uint32_t region, char **paths) {
    Copy first = copy_of(paths[0]), second = copy_of(paths[1]);
    void *of_first = NULL, *of_second = NULL, *in_order = NULL, *plain = NULL, *none = NULL;
    CUDA(0, first.malloc(&plain, 2 * MiB));
    OK(sire_region_enter(region, 0));
    CUDA(0, first.malloc(&of_first, 2 * MiB));
    CUDA(0, second.malloc(&of_second, 4 * MiB));
    CUDA(0, second.malloc_async(&in_order, 2 * MiB, NULL));
    CUDA(2, second.malloc(&none, (size_t)1 << 40));
    OK(sire_region_leave(region));
    CHECK(!none && second.last_error() == 2 && second.last_error() == 0 && first.last_error() == 0);
    CHECK(sire_owns(of_first) && sire_owns(of_second) && sire_owns(in_order) && !sire_owns(plain));
    fill(plain, 2 * MiB, 1);
    fill(of_first, 2 * MiB, 2);
    fill(of_second, 4 * MiB, 3);
    uint64_t used = device_used(0);
    OK(sire_pause("r", NULL, NULL));
    CHECK(used - device_used(0) == 8 * MiB && holds(plain, 2 * MiB, 1));
    OK(sire_region_suspend());
    CUDA(2, second.malloc(&none, (size_t)1 << 40));
    OK(sire_region_unsuspend());
    CUDA(2, second.last_error());
    OK(sire_resume("r", NULL, NULL));
    CHECK(holds(of_first, 2 * MiB, 2) && holds(of_second, 4 * MiB, 3));
    CUDA(0, second.free(of_first));
    CUDA(0, cudaFree(of_second)); /* the program's own runtime */
    CUDA(0, first.free_async(in_order, NULL));
    CUDA(0, second.free(plain));
    CUDA(1, second.free(plain));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
}

/* Which library is heard is asked for each by itself, and its memory goes and stays accordingly. */
static void lists(uint32_t region, char **paths, int own) {
    int (*alloc[2])(Ptr *, size_t), (*release[2])(Ptr);
    Ptr memory[2] = {0, 0}, linked = 0, found = 0;
    for (int i = 0; i < 2; i++) {
        Find find = (Find)dlsym(dlopen(paths[i], RTLD_NOW | RTLD_LOCAL), "private_find");
        CHECK(find != NULL);
        alloc[i] = (int (*)(Ptr *, size_t))find("cuMemAlloc_v2", "cuMemAlloc", 12000, 0);
        release[i] = (int (*)(Ptr))find("cuMemFree_v2", "cuMemFree", 12000, 0);
        CHECK(alloc[i] && release[i]);
    }
    OK(sire_region_enter(region, 0));
    for (int i = 0; i < 2; i++) CUDA(0, alloc[i](&memory[i], 2 * MiB));
    CUDA(0, cuMemAlloc_v2(&linked, 2 * MiB));
    CUDA(0, ((int (*)(Ptr *, size_t))driver_function("cuMemAlloc_v2"))(&found, 2 * MiB));
    OK(sire_region_leave(region));
    CHECK(sire_owns((void *)(uintptr_t)memory[0]) && !sire_owns((void *)(uintptr_t)memory[1]));
    CHECK(sire_owns((void *)(uintptr_t)linked) == own && sire_owns((void *)(uintptr_t)found) == own);
    for (int i = 0; i < 2; i++) fill((void *)(uintptr_t)memory[i], 2 * MiB, 5 + i);
    uint64_t used = device_used(0);
    OK(sire_pause("r", NULL, NULL));
    CHECK(used - device_used(0) == (uint64_t)(2 + 4 * own) * MiB);
    CHECK(holds((void *)(uintptr_t)memory[1], 2 * MiB, 6));
    OK(sire_resume("r", NULL, NULL));
    CHECK(holds((void *)(uintptr_t)memory[0], 2 * MiB, 5));
    for (int i = 0; i < 2; i++) CUDA(0, release[i](memory[i]));
    CUDA(0, cuMemFree_v2(linked));
    CUDA(0, cuMemFree_v2(found));
}

static void *of_early(const char *name) {
    void **there = dlsym(RTLD_DEFAULT, name);
    CHECK(there != NULL);
    return *there;
}

/* It was served in its constructor as it would be later. RTLD_NEXT finds what lies behind it, as for every other interposer. */
static void early(int heard) {
    void *runtime = of_early("early_memory"), *driver = of_early("early_driver_memory");
    CHECK(is_ours(of_early("early_by_handle")) == heard);
    CHECK(in_file(of_early("early_runtime"), "libsire_alloc"));
    printf("next %s\nanyone %s\nruntime next %s\n", file_of(of_early("early_next")), file_of(of_early("early_anyone")), file_of(of_early("early_runtime_next")));
    CHECK(sire_owns(runtime) && sire_owns(driver) == heard);
    fill(runtime, 3 * MiB, 7);
    fill(driver, 3 * MiB, 8);
    uint64_t used = device_used(0);
    OK(sire_pause("whole", NULL, NULL));
    CHECK(used - device_used(0) >= (uint64_t)(3 + 3 * heard) * MiB);
    OK(sire_resume("whole", NULL, NULL));
    CHECK(holds(runtime, 3 * MiB, 7) && holds(driver, 3 * MiB, 8));
    CUDA(0, cudaFree(runtime));
    CUDA(0, ((int (*)(Ptr))driver_function("cuMemFree_v2"))((Ptr)(uintptr_t)driver));
}

static uint32_t of_threads;
static void *worker(void *failed) {
    with_context();
    for (int i = 0; i < 150 && !*(int *)failed; i++) {
        int (*alloc)(Ptr *, size_t) = (int (*)(Ptr *, size_t))driver_function("cuMemAlloc_v2");
        Ptr ptr = 0;
        int inside = i % 3 == 0 && sire_region_enter(of_threads, 0) == SIRE_STATUS_OK;
        int code = alloc(&ptr, 64 * KiB);
        if (inside) OK(sire_region_leave(of_threads));
        if (code || (inside && !sire_owns((void *)(uintptr_t)ptr)) || cuMemFree_v2(ptr) || dlsym(RTLD_DEFAULT, "cuNoSuchThing")) *(int *)failed = 1;
    }
    return NULL;
}

static void threads(uint32_t region) {
    pthread_t all[4];
    int failed[4] = {0};
    of_threads = region;
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&all[i], NULL, worker, &failed[i]) == 0);
    for (int i = 0; i < 10; i++) {
        int status = sire_pause("r", NULL, NULL);
        CHECK(status == SIRE_STATUS_OK || status == SIRE_STATUS_BUSY);
        OK(sire_resume("r", NULL, NULL));
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(all[i], NULL);
        CHECK(!failed[i]);
    }
}

int main(int argc, char **argv) {
    CHECK(argc >= 2);
    watchdog();
    if (!strcmp(argv[1], "chain")) {
        int (*first)(int) = (int (*)(int))dlsym(RTLD_DEFAULT, "chain");
        CHECK(first != NULL && first(0) == 2);
        int (*release)(Ptr) = (int (*)(Ptr))dlsym(RTLD_DEFAULT, "cuMemFree_v2");
        CHECK(release != NULL && release(0) == 0);
        return 0;
    }
    if (!strcmp(argv[1], "early")) {
        early(argv[2][0] == '1');
        return 0;
    }
    with_context();
    uint32_t region = region_of("r", 1);
    if (!strcmp(argv[1], "company")) company(region);
    if (!strcmp(argv[1], "two")) two(region, argv + 2);
    if (!strcmp(argv[1], "copies")) copies(region, argv + 2);
    if (!strcmp(argv[1], "lists")) lists(region, argv + 2, argv[4][0] == '1');
    if (!strcmp(argv[1], "threads")) threads(region);
    return 0;
}
