/* What is allocated in the order of a stream that captures is the graph's: CUDA records it, and makes and frees it with each replay. Inside a
 * region, too, it is left to CUDA. Sire once gave memory of its own, which was free after the program's free, while the graph went on writing there.
 * (The software device does not record such allocations, and says so with error 900: that the question came to it is what is tested.) */
#include "support.h"

static void *allocated(int (*allocate)(void **, size_t, void *), size_t size, void *stream, int *code) {
    void *made = NULL;
    *code = allocate(&made, size, stream);
    return made;
}

int main(void) {
    uint32_t region = region_of("graphs", 0);
    void *capturing = NULL, *other = NULL, *graph = NULL;
    int code = 0;
    CUDA(0, cudaStreamCreate(&capturing));
    CUDA(0, cudaStreamCreate(&other));
    OK(sire_region_enter(region, 0));
    void *before = allocated(cudaMallocAsync, MiB, capturing, &code);
    CHECK(code == 0 && sire_owns(before));

    CUDA(0, cudaStreamBeginCapture(capturing, 2));
    /* Another stream is not recorded, and plain cudaMalloc never is. */
    void *beside = allocated(cudaMallocAsync, MiB, other, &code), *plain = NULL;
    CHECK(code == 0 && sire_owns(beside));
    CUDA(0, cudaMalloc(&plain, MiB));
    CHECK(sire_owns(plain));
    void *recorded = allocated(cudaMallocAsync, MiB, capturing, &code);
    CHECK(code == 900 || !sire_owns(recorded));
    (void)cudaStreamEndCapture(capturing, &graph);
    OK(sire_region_leave(region));

    CUDA(0, cudaFreeAsync(before, capturing));
    CUDA(0, cudaFreeAsync(beside, other));
    CUDA(0, cudaFree(plain));
    return 0;
}
