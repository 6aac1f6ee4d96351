/* A resume in the background: what is ready can be used, the rest is waited for, and a wrong question gets an answer. */
#include "support.h"
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

cudaError cudaStreamGetFlags(void *stream, unsigned *flags), cudaStreamQuery(void *stream);
cudaError cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data);
cudaError cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream);
/* The runtime that programs are linked with does not have them. */
#define DEVICE(function) ((__typeof__(&function))dlsym(RTLD_DEFAULT, #function))
enum { ON_DEVICE = 3, NOT_READY = 600, NON_BLOCKING = 1, RELAXED = 2 };

enum { COUNT = 4, SIZE = 32 * MiB };

static sire_progress *start(const sire_resume_options *options) {
    sire_progress *progress = NULL;
    OK(sire_resume_start("a", options, &progress));
    CHECK(progress != NULL);
    return progress;
}

static atomic_int closed;

static void wait_until_open(void *unused) {
    (void)unused;
    while (atomic_load(&closed)) usleep(1000);
}

/* Sire's copies are queued from now on, and none begins. On the software device streams are numbers, of which `last` is one of the newest; the
 * program itself makes only streams that wait for the default one. */
static void hold_copies(void *last) {
    int held = 0;
    atomic_store(&closed, 1);
    for (uintptr_t number = 16; number < (uintptr_t)last; number += 16) {
        unsigned flags = 0;
        if (DEVICE(cudaStreamGetFlags)((void *)number, &flags) != 0 || flags != NON_BLOCKING) continue;
        CUDA(0, DEVICE(cudaLaunchHostFunc)((void *)number, wait_until_open, NULL));
        held++;
    }
    cudaGetLastError();
    CHECK(held > 0);
}

/* Whoever has a stream goes on when the copies are queued; the stream waits for them. */
static void streams_wait(void) {
    enum { FEW = 2 * MiB };
    uint32_t region = region_of("a", 1);
    char *ours = allocate_in(region, FEW), *other = NULL;
    void *stream = NULL, *graph = NULL;
    bool queued = false, ready = true;
    CUDA(0, cudaMalloc((void **)&other, FEW));
    fill(ours, FEW, 7);
    OK(sire_pause("a", NULL, NULL));
    CUDA(0, cudaStreamCreate(&stream));

    hold_copies(stream);
    sire_progress *progress = start(NULL);
    OK(sire_progress_wait_stream(progress, ours, FEW, 0, stream, INFINITY, &queued));
    OK(sire_progress_ready(progress, ours, FEW, &ready));
    CHECK(queued && !ready);
    CUDA(0, DEVICE(cudaMemcpyAsync)(other, ours, FEW, ON_DEVICE, stream));
    CUDA(NOT_READY, DEVICE(cudaStreamQuery)(stream));
    OK(sire_progress_wait_stream(progress, NULL, 0, 0, stream, INFINITY, &queued));
    OK(sire_progress_wait(progress, NULL, 0, 0, &ready));
    CHECK(queued && !ready);
    CHECK(sire_progress_wait_stream(progress, ours, FEW, 0, (void *)12345, 0, NULL) != SIRE_STATUS_OK);
    CHECK(sire_progress_wait_stream(progress, ours, FEW, 99, NULL, 0, NULL) != SIRE_STATUS_OK);
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_wait_stream(progress, ours, FEW, -1, stream, 0, &queued));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_wait_stream(progress, ours, FEW, 0, stream, NAN, &queued));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_wait_stream(NULL, ours, FEW, 0, stream, 0, &queued));
    atomic_store(&closed, 0);
    CUDA(0, cudaStreamSynchronize(stream));
    CHECK(holds(other, FEW, 7));
    OK(sire_progress_wait(progress, NULL, 0, INFINITY, &ready));
    OK(sire_progress_wait_stream(progress, ours, FEW, 0, stream, 0, &queued));
    CHECK(ready && queued);
    OK(sire_progress_close(progress));

    /* A stream that captures a graph is left alone: the caller waits, and the capture goes on. */
    OK(sire_pause("a", NULL, NULL));
    hold_copies(stream);
    progress = start(NULL);
    CUDA(0, cudaStreamBeginCapture(stream, RELAXED));
    OK(sire_progress_wait_stream(progress, ours, FEW, 0, stream, 0.01, &queued));
    CHECK(!queued);
    atomic_store(&closed, 0);
    OK(sire_progress_wait_stream(progress, ours, FEW, 0, stream, INFINITY, &queued));
    OK(sire_progress_ready(progress, ours, FEW, &ready));
    CHECK(queued && ready);
    CUDA(0, cudaStreamEndCapture(stream, &graph));
    CUDA(0, cudaGraphDestroy(graph));
    OK(sire_progress_wait(progress, NULL, 0, INFINITY, &ready));
    OK(sire_progress_close(progress));
    CUDA(0, cudaStreamDestroy(stream));
    CUDA(0, cudaFree(other));
    CUDA(0, cudaFree(ours));
}

int main(void) {
    streams_wait();
    uint32_t region = region_of("a", 1);
    char *ours[COUNT];
    sire_range order[COUNT];
    for (int i = 0; i < COUNT; i++) {
        ours[i] = allocate_in(region, SIZE);
        fill(ours[i], SIZE, i);
        order[COUNT - 1 - i] = (sire_range){ours[i], SIZE};
    }
    OK(sire_pause("a", NULL, NULL));
    CHECK(device_used(0) == 0);

    sire_progress *progress = NULL;
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_resume_start("nobody", NULL, &progress));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_resume_start("a", NULL, NULL));
    sire_resume_options options = {.struct_size = sizeof options, .order = (sire_range *)((char *)order + 1), .order_count = 1};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_resume_start("a", &options, &progress));
    CHECK(progress == NULL && device_used(0) == 0);

    options.order = order;
    options.order_count = COUNT;
    progress = start(&options);
    bool ready = false;
    for (int i = COUNT; i-- > 0;) {
        OK(sire_progress_wait(progress, ours[i], SIZE, INFINITY, &ready));
        CHECK(ready);
        OK(sire_progress_ready(progress, ours[i], SIZE, &ready));
        CHECK(ready && holds(ours[i], SIZE, i));
    }
    OK(sire_progress_wait(progress, NULL, 0, 60, &ready));
    CHECK(ready);
    sire_report report = {.struct_size = sizeof report};
    OK(sire_progress_report(progress, &report));
    CHECK(report.regions_changed == 1 && report.bytes_copied == (uint64_t)COUNT * SIZE);
    uint64_t arrived = 0, total = 0;
    OK(sire_progress_bytes(progress, &arrived, &total));
    CHECK(arrived == total && total == (uint64_t)COUNT * SIZE);
    OK(sire_progress_cancel(progress));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_wait(progress, NULL, 0, -1, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_wait(progress, NULL, 0, NAN, NULL));
    OK(sire_progress_wait(progress, NULL, 0, 0, NULL));
    OK(sire_progress_ready(progress, NULL, 1, &ready));
    CHECK(ready);
    OK(sire_progress_close(progress));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_ready(NULL, ours[0], 1, &ready));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_wait(NULL, ours[0], 1, 0, &ready));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_report(NULL, &report));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_bytes(NULL, NULL, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_progress_cancel(NULL));
    OK(sire_progress_close(NULL));

    /* Before it is over there is no report. */
    OK(sire_pause("a", NULL, NULL));
    device_fault("cuMemcpyHtoDAsync_v2=delay:300000");
    progress = start(NULL);
    EXPECT(SIRE_STATUS_BUSY, sire_progress_report(progress, &report));
    SAYS("the resume is not over; wait for it");
    device_fault("");
    OK(sire_progress_wait(progress, NULL, 0, INFINITY, &ready));
    OK(sire_progress_report(progress, &report));
    OK(sire_progress_close(progress));

    /* A copy that fails: whoever waits hears of it, and the region can be resumed. */
    OK(sire_pause("a", NULL, NULL));
    device_fault("cuMemcpyHtoDAsync_v2#3=error:999");
    progress = start(NULL);
    CHECK(sire_progress_wait(progress, NULL, 0, INFINITY, &ready) != SIRE_STATUS_OK);
    CHECK(sire_progress_report(progress, &report) != SIRE_STATUS_OK);
    OK(sire_progress_close(progress));
    device_fault("");
    OK(sire_resume("a", NULL, NULL));
    for (int i = 0; i < COUNT; i++) CHECK(holds(ours[i], SIZE, i));

    /* The process ends while a resume is under way. */
    OK(sire_pause("a", NULL, NULL));
    OK(sire_progress_close(start(NULL)));
    return 0;
}
