/* While a stream capture is in progress Sire never synchronises: pause is refused, free is deferred, allocation works. */
#include "support.h"

#include <dlfcn.h>

static void refused_until(void) {
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause(NULL, NULL, NULL));
    SAYS("captur");
    EXPECT(SIRE_STATUS_CAPTURING, sire_resume(NULL, NULL, NULL));
}

int main(void) {
    uint32_t region = region_of("graphs", 1);
    void *early = allocate_in(region, 6 * MiB), *kept = allocate_in(region, 2 * MiB);
    fill(kept, 2 * MiB, 3);
    void *stream = NULL, *graph = NULL, *made = NULL;
    CUDA(0, cudaStreamCreate(&stream));
    uint64_t before = device_used(0);

    for (int mode = 0; mode < 3; mode++) {
        CUDA(0, cudaStreamBeginCapture(stream, mode));
        refused_until();
        OK(sire_region_enter(region, 0));
        CUDA(0, cudaMalloc(&made, 4 * MiB));
        OK(sire_region_leave(region));
        CUDA(0, cudaMemsetAsync(made, 1, 4 * MiB, stream));
        if (mode == 0) CUDA(0, cudaFree(early));
        CHECK(mode != 0 || !sire_owns(early) || device_used(0) >= before);
        /* The capture is still valid: nothing of ours has synchronised. */
        CUDA(0, cudaStreamEndCapture(stream, &graph));
        CHECK(graph != NULL);
        CUDA(0, cudaGraphDestroy(graph));
        CUDA(0, cudaFree(made));
        OK(sire_pause(NULL, NULL, NULL));
        OK(sire_resume(NULL, NULL, NULL));
    }
    CHECK(holds(kept, 2 * MiB, 3));

    /* Into a graph that the program has made. */
    void *into = NULL;
    CUDA(0, cudaGraphCreate(&into, 0));
    CUDA(0, cudaStreamBeginCaptureToGraph(stream, into, NULL, NULL, 0, 2));
    refused_until();
    OK(sire_region_enter(region, 0));
    CUDA(0, cudaMalloc(&made, 4 * MiB));
    OK(sire_region_leave(region));
    CUDA(0, cudaMemsetAsync(made, 1, 4 * MiB, stream));
    CUDA(0, cudaStreamEndCapture(stream, &graph));
    CHECK(graph == into);
    /* And into one that it has captured before (CUDA 13.3). Nobody heard that begin: a pause waited for the device, which voided the capture. */
    CUDA(0, cudaStreamBeginRecaptureToGraph(stream, 2, into, NULL));
    refused_until();
    CUDA(0, cudaMemsetAsync(made, 2, 4 * MiB, stream));
    CUDA(0, cudaStreamEndCapture(stream, &graph));
    CHECK(graph == into);
    CUDA(0, cudaGraphDestroy(graph));
    CUDA(0, cudaFree(made));
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(cudaStreamBeginCaptureToGraph(stream, into, NULL, NULL, 0, 2) != 0); /* it is gone */
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));

    /* A capture that could not begin does not count; one that we are told about does. */
    CHECK(cudaStreamBeginCapture(stream, 77) != 0);
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));
    OK(sire_capture_begin());
    OK(sire_capture_begin());
    OK(sire_capture_end());
    refused_until();
    OK(sire_capture_end());
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));

    /* A capture that began unheard (here by the driver's own function) is not counted, and its end once counted for another's. */
    int (*begin_unheard)(void *, int) = (int (*)(void *, int))dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuStreamBeginCapture_v2");
    void *unheard = NULL;
    CHECK(begin_unheard != NULL);
    CUDA(0, cudaStreamCreate(&unheard));
    CUDA(0, cudaStreamBeginCapture(stream, 2));
    CUDA(0, begin_unheard(unheard, 2));
    CUDA(0, cudaStreamEndCapture(unheard, &graph));
    CUDA(0, cudaGraphDestroy(graph));
    refused_until();
    CUDA(0, cudaStreamEndCapture(stream, &graph));
    CUDA(0, cudaGraphDestroy(graph));
    CUDA(0, cudaStreamDestroy(unheard));
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));

    /* A stream destroyed while it captures takes its capture along. The count once stayed up, and nothing could be paused any more. */
    void *doomed = NULL;
    CUDA(0, cudaStreamCreate(&doomed));
    CUDA(0, cudaStreamBeginCapture(doomed, 2));
    refused_until();
    CUDA(0, cudaStreamDestroy(doomed));
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(cudaStreamDestroy(NULL) != 0);

    /* Nor is anything resumed or trimmed on the way: entering a paused region with on_paused 1 once did, and so did sire_trim. */
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_capture_begin());
    EXPECT(SIRE_STATUS_CAPTURING, sire_region_enter(region, 1));
    SAYS("captur");
    EXPECT(SIRE_STATUS_PAUSED, sire_region_enter(region, 0));
    EXPECT(SIRE_STATUS_CAPTURING, sire_trim(NULL, NULL));
    SAYS("captur");
    OK(sire_capture_end());
    OK(sire_region_enter(region, 1));
    OK(sire_region_leave(region));
    CHECK(holds(kept, 2 * MiB, 3));

    CUDA(0, cudaFree(kept));
    CUDA(0, cudaStreamDestroy(stream));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
