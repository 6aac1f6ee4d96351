/* A program that was compiled with --default-stream per-thread: its runtime's functions have other names, and stream 0 is the thread's own.
 * argv: arguments (on the counting runtime of fixtures/: all arrive as they were passed) | device. */
#define _GNU_SOURCE
#include "support.h"

static void arguments(void) {
    void *out = NULL, *graph = NULL;
    int status = 0;
    CUDA(71, cudaMallocFromPoolAsync(&out, 5, (void *)9, (void *)6));
    CHECK(out == (void *)9);
    CUDA(72, cudaMallocFromPoolAsync_ptsz(&out, 5, (void *)8, (void *)6));
    CHECK(out == (void *)8);
    CUDA(73, cudaMallocAsync_ptsz(&out, 5, (void *)6));
    CHECK(out == (void *)6);
    CUDA(73, cudaMallocAsync_ptsz(&out, 5, NULL)); /* what stream 0 means is the runtime's business */
    CHECK(out == NULL);
    CUDA(74, cudaFreeAsync_ptsz((void *)5, (void *)6));
    CUDA(75, cudaStreamBeginCapture_ptsz((void *)6, 2));
    CUDA(401, cudaStreamEndCapture_ptsz((void *)6, &graph));
    CHECK(graph == (void *)6);
    CUDA(76, cudaStreamBeginCaptureToGraph_ptsz((void *)1, (void *)2, (void *)3, (void *)4, 5, 6));
    CUDA(79, cudaStreamBeginRecaptureToGraph((void *)1, 2, (void *)3, (void *)4));
    CUDA(80, cudaStreamBeginRecaptureToGraph_ptsz((void *)1, 2, (void *)3, (void *)4));
    CUDA(77, cudaGetDriverEntryPoint_ptsz("x", &out, 1, &status));
    CHECK(out == (void *)301 && status == 'x');
    CUDA(78, cudaGetDriverEntryPointByVersion_ptsz("y", &out, 12000, 2, &status));
    CHECK(out == (void *)12002 && status == 'y');
    CUDA(801, cudaMemPoolCreate(&out, (void *)8));
    CHECK(out == (void *)9);
    CUDA(801, cudaMemPoolDestroy((void *)9));
    CUDA(801, cudaMemPoolSetAccess((void *)9, (void *)8, 7));
}

static void capture(uint32_t region) {
    void *stream = NULL, *graph = NULL, *made = NULL;
    CUDA(0, cudaStreamCreate(&stream));
    CUDA(0, cudaStreamBeginCapture_ptsz(stream, 2));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("own stream", NULL, NULL));
    made = allocate_in(region, 2 * MiB);
    CUDA(0, cudaMemsetAsync_ptsz(made, 1, 2 * MiB, stream));
    CUDA(0, cudaStreamEndCapture_ptsz(stream, &graph));
    CHECK(graph != NULL);
    CUDA(0, cudaGraphDestroy(graph));
    /* The thread's own stream can be captured by its number only, and stream 0 is it. */
    CUDA(0, cudaStreamBeginCapture_ptsz(NULL, 2));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("own stream", NULL, NULL));
    CUDA(0, cudaStreamEndCapture_ptsz((void *)2, &graph));
    OK(sire_pause("own stream", NULL, NULL));
    OK(sire_resume("own stream", NULL, NULL));
    void *into = NULL, *ended = NULL;
    CUDA(0, cudaGraphCreate(&into, 0));
    CUDA(0, cudaStreamBeginCaptureToGraph_ptsz(NULL, into, NULL, NULL, 0, 2));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("own stream", NULL, NULL));
    CUDA(0, cudaStreamEndCapture_ptsz((void *)2, &ended));
    CHECK(ended == into);
    /* The same again, as CUDA 13.3 has it: nobody heard it begin, so a pause waited for the device, which voided the capture. */
    CUDA(0, cudaStreamBeginRecaptureToGraph_ptsz(NULL, 2, into, NULL));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("own stream", NULL, NULL));
    CUDA(0, cudaStreamEndCapture_ptsz((void *)2, &ended));
    CHECK(ended == into);
    CUDA(0, cudaGraphDestroy(into));
    OK(sire_pause("own stream", NULL, NULL));
    OK(sire_resume("own stream", NULL, NULL));
    CHECK(cudaStreamBeginCaptureToGraph_ptsz(stream, NULL, NULL, NULL, 0, 77) != 0);
    OK(sire_pause("own stream", NULL, NULL));
    OK(sire_resume("own stream", NULL, NULL));
    CUDA(0, cudaGraphDestroy(graph));
    CUDA(0, cudaFree(made));
    CUDA(0, cudaStreamDestroy(stream));
}

/* The driver's functions are those for the thread's own stream, of which Sire's stay Sire's. */
static void entry_points(void) {
    void *plain = NULL, *own = NULL, *legacy = NULL, *again = NULL;
    int status = -1;
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemFreeAsync", &plain, 12000, 0, NULL));
    CUDA(0, cudaGetDriverEntryPointByVersion_ptsz("cuMemFreeAsync", &own, 12000, 0, &status));
    CHECK(plain != NULL && own != NULL && plain != own && status == 0);
    CUDA(0, cudaGetDriverEntryPointByVersion_ptsz("cuMemFreeAsync", &legacy, 12000, 1, &status));
    CHECK(legacy == plain);
    CUDA(0, cudaGetDriverEntryPoint_ptsz("cuMemFreeAsync", &again, 0, &status));
    CHECK(again == own);
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemCreate", &plain, 12000, 0, NULL));
    CUDA(0, cudaGetDriverEntryPointByVersion_ptsz("cuMemCreate", &own, 12000, 0, &status));
    Dl_info where;
    CHECK(own == plain && dladdr(own, &where) && strstr(where.dli_fname, "libsire_alloc"));
    CUDA(0, cudaGetDriverEntryPoint_ptsz("cuMemCreate", &own, 2, NULL));
    CHECK(own == plain);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    if (!strcmp(argv[1], "arguments")) return arguments(), 0;
    uint32_t region = region_of("own stream", 1);
    void *ours = NULL, *plain = NULL, *pool = NULL, *pooled = NULL;
    CUDA(0, cudaMallocAsync_ptsz(&plain, 3 * MiB, NULL));
    CHECK(!sire_owns(plain));
    OK(sire_region_enter(region, 0));
    CUDA(0, cudaMallocAsync_ptsz(&ours, 6 * MiB, NULL));
    CUDA(0, cudaDeviceGetDefaultMemPool(&pool, 0));
    CUDA(0, cudaMallocFromPoolAsync_ptsz(&pooled, 4 * MiB, pool, NULL));
    OK(sire_region_leave(region));
    CHECK(sire_owns(ours) && sire_owns(pooled));
    /* Written and read in the order of that stream alone. */
    unsigned char host[KiB], back[KiB];
    memset(host, 5, sizeof host);
    CUDA(0, cudaMemset_ptds(ours, 4, 6 * MiB));
    CUDA(0, cudaMemcpyAsync_ptsz((char *)ours + MiB, host, KiB, TO_DEVICE, NULL));
    CUDA(0, cudaStreamSynchronize_ptsz(NULL));
    uint64_t used = device_used(0);
    OK(sire_pause("own stream", NULL, NULL));
    CHECK(used - device_used(0) == 10 * MiB);
    OK(sire_resume("own stream", NULL, NULL));
    CUDA(0, cudaMemcpy_ptds(back, (char *)ours + MiB, KiB, TO_HOST));
    for (int i = 0; i < KiB; i++) CHECK(back[i] == 5);
    CUDA(0, cudaMemcpy_ptds(back, (char *)ours + MiB - KiB, KiB, TO_HOST));
    for (int i = 0; i < KiB; i++) CHECK(back[i] == 4);
    capture(region);
    entry_points();
    CUDA(0, cudaFreeAsync_ptsz(pooled, NULL));
    CUDA(0, cudaFreeAsync_ptsz(ours, NULL));
    CUDA(0, cudaFreeAsync_ptsz(plain, NULL));
    CHECK(cudaFreeAsync_ptsz((char *)ours + 4096, NULL) != 0);
    CUDA(0, cudaStreamSynchronize_ptsz(NULL));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
