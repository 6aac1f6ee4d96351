/* A call that waits for the device has a pause beside it copy in shorter pieces; one in the order of a stream, of no memory, or of the pausing thread itself, does
 * not. argv: the functions that call, `runtime` or `driver`. */
#define _GNU_SOURCE
#include "driver.h"
#include <pthread.h>

/* 64 MiB in pieces: of 1 MiB, or of 2, 2, 4 and then 8. */
enum { SIZE = 64 * MiB, SHORT = 64, LONG = 10 };
/* A copy, its event, and a wait; each goes into the device's context and out of it. */
enum { PER_PIECE = 3 * 3 };

static int in_order, by_driver;

static void *call(void *unused) {
    void *plain = NULL;
    Ptr address = 0;
    if (by_driver) {
        void *context = NULL;
        CUDA(0, cuDevicePrimaryCtxRetain(&context, 0));
        CUDA(0, cuCtxSetCurrent(context));
    }
    if (by_driver && in_order) {
        CUDA(0, cuMemAllocAsync(&address, MiB, NULL));
        CUDA(0, cuMemFreeAsync(address, NULL));
    } else if (by_driver) {
        CUDA(0, cuMemAlloc_v2(&address, MiB));
        CUDA(0, cuMemFree_v2(address));
    } else if (in_order) {
        CUDA(0, cudaMallocAsync(&plain, MiB, NULL));
        CUDA(0, cudaFreeAsync(plain, NULL));
        CUDA(0, cudaFree(NULL));
    } else {
        CUDA(0, cudaMalloc(&plain, MiB));
        CUDA(0, cudaFree(plain));
    }
    return unused;
}

static void call_from_another_thread(void) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, call, NULL) == 0 && pthread_join(thread, NULL) == 0);
}

/* How many calls of the driver a pause takes. */
static long pause_calls(void) {
    long before = statistic("counters", "driver_calls");
    OK(sire_pause("r", NULL, NULL));
    long calls = statistic("counters", "driver_calls") - before;
    OK(sire_resume("r", NULL, NULL));
    return calls;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    by_driver = !strcmp(argv[1], "driver");
    char *memory = allocate_in(region_of("r", 1), SIZE);
    fill(memory, SIZE, 1);
    (void)pause_calls();
    long calm = pause_calls();
    in_order = 1;
    call_from_another_thread();
    CHECK(pause_calls() == calm);
    in_order = 0;
    (void)call(NULL);
    CHECK(pause_calls() == calm);
    long disturbed = calm;
    /* A machine that stalls for a second between the two has forgotten the call. */
    for (int attempt = 0; attempt < 5 && disturbed == calm; attempt++) {
        call_from_another_thread();
        disturbed = pause_calls();
    }
    if (disturbed != calm + PER_PIECE * (SHORT - LONG)) fprintf(stderr, "%ld calls in calm, %ld disturbed\n", calm, disturbed);
    CHECK(disturbed == calm + PER_PIECE * (SHORT - LONG));
    CHECK(holds(memory, SIZE, 1));
    CUDA(0, cudaFree(memory));
    return 0;
}
