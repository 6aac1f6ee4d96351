/* What it costs to be there: nanoseconds per call that Sire passes on, or has nothing to do with.
 *
 *     passthrough OPERATIONS
 *
 * The same program runs without Sire, with the library preloaded, and with driver-level hooks. Operations are timed in batches of
 * 100, and the median batch is reported. */
#include "bench.h"

enum { BATCH = 100 };

cudaError cudaGetDevice(int *device);

static void *library;
static int (*alloc)(unsigned long long *, size_t);
static int (*release)(unsigned long long);

/* Outside regions both are the driver's: what Sire adds is that it looks whose call it is, and finds the next definition. */
static void a_call_that_is_passed_on(void) { MUST(cudaFree(NULL) == 0); }

static void a_pair_that_is_passed_on(void) {
    void *ptr;
    MUST(cudaMalloc(&ptr, 512) == 0 && cudaFree(ptr) == 0);
}

static void a_call_that_is_not_hooked(void) {
    int device;
    MUST(cudaGetDevice(&device) == 0);
}

static void a_look_up_of_another_name(void) { MUST(dlsym(library, "cuCtxGetCurrent") != NULL); }
static void a_look_up_of_no_name_of_cudas(void) { MUST(dlsym(RTLD_DEFAULT, "malloc") != NULL); }
static void a_look_up_that_is_hooked(void) { MUST(dlsym(library, "cuMemAlloc_v2") != NULL); }

static void a_pair_at_driver_level(void) {
    unsigned long long ptr;
    MUST(alloc(&ptr, 512) == 0 && release(ptr) == 0);
}

static void timed(const char *name, void (*operation)(void), long operations) {
    long batches = operations / BATCH;
    double *times = malloc(sizeof *times * (size_t)batches);
    for (int i = 0; i < BATCH; i++) operation();
    for (long number = 0; number < batches; number++) {
        double start = now();
        for (int i = 0; i < BATCH; i++) operation();
        times[number] = (now() - start) / BATCH * 1e9;
    }
    qsort(times, (size_t)batches, sizeof *times, ascending);
    result(name, quantile(times, batches, 0.5), "ns", operations);
    free(times);
}

int main(int argc, char **argv) {
    MUST(argc == 2);
    long operations = atol(argv[1]);
    MUST(cudaFree(NULL) == 0);
    library = dlopen("libcuda.so.1", RTLD_NOW);
    MUST(library != NULL);
    *(void **)&alloc = dlsym(library, "cuMemAlloc_v2");
    *(void **)&release = dlsym(library, "cuMemFree_v2");
    MUST(alloc && release);
    timed("passthrough", a_call_that_is_passed_on, operations);
    timed("runtime_pair", a_pair_that_is_passed_on, operations);
    timed("other_call", a_call_that_is_not_hooked, operations);
    timed("plain_lookup", a_look_up_of_no_name_of_cudas, operations);
    timed("other_lookup", a_look_up_of_another_name, operations);
    timed("lookup", a_look_up_that_is_hooked, operations);
    timed("driver_pair", a_pair_at_driver_level, operations);
    return 0;
}
