/* Threads: each has its own regions, the process-wide one is for those that have none, and transitions run beside allocation. */
#include "support.h"
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

static uint32_t left, right, wide;
static atomic_int stop, rounds[2];

static void *worker(void *argument) {
    int number = (int)(intptr_t)argument;
    uint32_t region = number ? right : left;
    while (!atomic_load(&stop)) {
        void *mine[3];
        OK(sire_region_enter(region, 1));
        for (int i = 0; i < 3; i++) {
            CUDA(0, cudaMalloc(&mine[i], (i + 1) * 300 * KiB));
            uint32_t of = UINT32_MAX;
            OK(sire_allocation(mine[i], NULL, NULL, NULL, &of));
            CHECK(of == region);
            fill(mine[i], 300 * KiB, number * 3 + i);
        }
        for (int i = 0; i < 3; i++) CHECK(holds(mine[i], 300 * KiB, number * 3 + i));
        for (int i = 0; i < 3; i++) CUDA(0, cudaFree(mine[i]));
        OK(sire_region_leave(region));
        atomic_fetch_add(&rounds[number], 1);
        /* Outside for a while: a pause that always finds somebody inside would show nothing. */
        usleep(200);
    }
    return NULL;
}

static void *outsider(void *unused) {
    (void)unused;
    uint32_t current = 0, of = 0;
    void *out = NULL;
    OK(sire_region_current(&current));
    CHECK(current == wide);
    CUDA(0, cudaMalloc(&out, MiB));
    OK(sire_allocation(out, NULL, NULL, NULL, &of));
    CHECK(of == wide);
    CUDA(0, cudaFree(out));
    OK(sire_region_suspend());
    OK(sire_region_suspend());
    OK(sire_region_unsuspend());
    CUDA(0, cudaMalloc(&out, MiB));
    CHECK(!sire_owns(out));
    OK(sire_region_unsuspend());
    CUDA(0, cudaFree(out));
    return NULL;
}

static void *forgetful(void *unused) {
    (void)unused;
    OK(sire_region_enter(left, 0));
    OK(sire_region_enter(right, 0));
    return NULL;
}

static void run(void *(*body)(void *)) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, body, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
}

int main(void) {
    left = region_of("left", 1), right = region_of("right", 1), wide = region_of("wide", 1);
    void *kept = allocate_in(left, 5 * MiB);
    fill(kept, 5 * MiB, 21);

    OK(sire_process_region_set(wide));
    run(outsider);
    OK(sire_process_region_set(UINT32_MAX));

    /* A thread that died inside does not keep its regions busy. */
    run(forgetful);
    OK(sire_pause("left", NULL, NULL));
    OK(sire_resume("left", NULL, NULL));

    pthread_t threads[2];
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[i], NULL, worker, (void *)(intptr_t)i) == 0);
    int paused = 0, busy = 0;
    for (int i = 0; i < 200 || ((paused == 0 || busy == 0) && i < 5000); i++) {
        int status = sire_pause("left", NULL, NULL);
        CHECK(status == SIRE_STATUS_OK || status == SIRE_STATUS_BUSY);
        status == SIRE_STATUS_OK ? paused++ : busy++;
        status = sire_resume("left", NULL, NULL);
        CHECK(status == SIRE_STATUS_OK || status == SIRE_STATUS_BUSY);
        usleep(500);
    }
    /* The right one goes on while the left one is paused. */
    int before = atomic_load(&rounds[1]);
    for (int i = 0; i < 2000 && atomic_load(&rounds[1]) < before + 3; i++) usleep(1000);
    CHECK(atomic_load(&rounds[1]) >= before + 3);
    atomic_store(&stop, 1);
    for (int i = 0; i < 2; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(paused > 0 && busy > 0);
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(kept, 5 * MiB, 21));
    CUDA(0, cudaFree(kept));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    printf("%d paused, %d busy\n", paused, busy);
    return 0;
}
