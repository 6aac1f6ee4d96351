/* A capture in CUDA's own default mode forbids potentially unsafe calls in every thread that is in that mode, and is void once one was made. Nothing that
 * Sire does while one is in progress may void it: host memory that is registered in the background, memory that is made and mapped for an allocation. */
#include "support.h"
#include <unistd.h>

#define RESERVE (256 * MiB)

static long registered(void) { return statistic("host", "registered_bytes"); }

int main(void) {
    uint32_t region = region_of("beside", 1);
    void *stream = NULL, *graph = NULL, *made = NULL, *kept = NULL;
    CUDA(0, cudaStreamCreate(&stream));
    CUDA(0, cudaMalloc(&kept, MiB));

    /* The first allocation has the reserve brought in and registered, part by part, by a thread of its own: most of it while the capture goes on. */
    made = allocate_in(region, 4 * MiB);
    CUDA(0, cudaStreamBeginCapture(stream, 0));
    CUDA(0, cudaMemsetAsync(kept, 1, MiB, stream));
    for (int i = 0; i < 6000 && registered() < RESERVE; i++) usleep(10 * 1000);
    CHECK(registered() >= RESERVE);
    CUDA(0, cudaFree(made));
    made = allocate_in(region, 8 * MiB);

    CUDA(0, cudaStreamEndCapture(stream, &graph));
    CHECK(graph != NULL);
    CUDA(0, cudaGraphDestroy(graph));
    fill(made, 8 * MiB, 5);
    OK(sire_pause("beside", NULL, NULL));
    OK(sire_resume("beside", NULL, NULL));
    CHECK(holds(made, 8 * MiB, 5));
    CUDA(0, cudaFree(made));
    CUDA(0, cudaFree(kept));
    CUDA(0, cudaStreamDestroy(stream));
    return 0;
}
