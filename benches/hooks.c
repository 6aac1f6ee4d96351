/* What a hook costs: nanoseconds and driver calls per operation, with LIVE allocations alive.
 *
 *     hooks pass|own LIVE OPERATIONS BYTES LABEL
 *
 * `pass`: calls outside any region, which Sire passes through (or, without Sire, the plain runtime). `own`: inside a region. The live
 * allocations are Sire's own where Sire is loaded, so that `pass` shows what telling foreign pointers from many own ones costs.
 * Operations are timed in batches of 100, and the median batch is reported: a batch in which the machine did
 * something else does not count. */
#include "bench.h"

enum { BATCH = 100 };

static void *make(size_t bytes) {
    void *out = NULL;
    MUST(cudaMalloc(&out, bytes) == 0 && out);
    return out;
}

int main(int argc, char **argv) {
    MUST(argc == 6);
    int own = !strcmp(argv[1], "own");
    long live = atol(argv[2]), operations = atol(argv[3]);
    size_t bytes = (size_t)atoll(argv[4]);
    const char *label = argv[5];
    sire_status (*open_region)(const char *, const sire_region_options *, uint32_t *) =
        (sire_status(*)(const char *, const sire_region_options *, uint32_t *))sire("sire_region_open");
    sire_status (*enter)(uint32_t, int32_t) = (sire_status(*)(uint32_t, int32_t))sire("sire_region_enter");
    sire_status (*leave)(uint32_t) = (sire_status(*)(uint32_t))sire("sire_region_leave");
    uint32_t region = 0;
    /* The counting runtime has no driver: then nothing of ours is alive, and only the pass-through is measured. */
    int regions = open_region && open_region("bench", NULL, &region) == SIRE_STATUS_OK;
    MUST(!own || regions);

    void **alive = malloc(sizeof *alive * (size_t)(live + 1));
    if (regions) MUST(enter(region, 0) == SIRE_STATUS_OK);
    for (long i = 0; i < live; i++) alive[i] = make(512);
    if (regions && !own) MUST(leave(region) == SIRE_STATUS_OK);

    long batches = operations / BATCH;
    double *allocate = malloc(sizeof *allocate * (size_t)batches), *release = malloc(sizeof *release * (size_t)batches);
    void *batch[BATCH];
    for (int i = 0; i < BATCH; i++) batch[i] = make(bytes);
    for (int i = 0; i < BATCH; i++) MUST(cudaFree(batch[i]) == 0);
    double calls = driver_calls();
    for (long number = 0; number < batches; number++) {
        double start = now();
        for (int i = 0; i < BATCH; i++) batch[i] = make(bytes);
        double middle = now();
        for (int i = 0; i < BATCH; i++) MUST(cudaFree(batch[i]) == 0);
        double end = now();
        allocate[number] = (middle - start) / BATCH * 1e9;
        release[number] = (end - middle) / BATCH * 1e9;
    }
    calls = driver_calls() - calls;
    qsort(allocate, (size_t)batches, sizeof *allocate, ascending);
    qsort(release, (size_t)batches, sizeof *release, ascending);

    char name[200];
    snprintf(name, sizeof name, "hooks/%s/allocate/live=%ld", label, live);
    result(name, quantile(allocate, batches, 0.5), "ns", operations);
    snprintf(name, sizeof name, "hooks/%s/free/live=%ld", label, live);
    result(name, quantile(release, batches, 0.5), "ns", operations);
    if (regions) {
        snprintf(name, sizeof name, "hooks/%s/driver calls per pair/live=%ld", label, live);
        result(name, calls / (double)(batches * BATCH), "calls", operations);
    }
    return 0;
}
