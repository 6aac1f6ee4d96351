/* How long allocate and free stall while a pause runs.
 *
 *     stall MEBIBYTES
 *
 * An open loop: another thread makes one call per millisecond, alternately an allocation and the free of one, and every latency counts
 * from the call's *intended* start, so that a stall shows in every call that it delays. Own pointers (in a region that is not paused) and
 * forwarded ones are measured apart, and forwarded ones that come seldom, one each 25 milliseconds. Each beside: nothing, a plain copy of
 * that many bytes to the host, such a copy in pieces of 4 MiB, and a pause with host backup. What was paused is compared after its resume.
 *
 * Where all processors are busy the kernel lets the loop's thread wait for one. Marks ending in `_running` are without that wait, as the kernel counts it
 * (schedstat): what of a stall is left is the library's, or the device's. */
#include "bench.h"
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

enum { MOST = 1 << 17, PIECE = 4 << 20 };

static uint32_t steady;
static sire_status (*enter)(uint32_t, int32_t), (*leave)(uint32_t);

struct loop {
    int own;
    /* Seconds from one call to the next. */
    double interval;
    atomic_int ready;
    long count;
    /* Calls that were to come before `end`: what it is beside may be over sooner than the loop. */
    _Atomic double end;
    double latency[2][MOST], running[2][MOST];
};

static void sleep_until(double when) {
    struct timespec time = {(time_t)when, (long)((when - (double)(time_t)when) * 1e9)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) != 0) {}
}

/* Seconds for which this thread was ready, and no processor was its own; 0 where the kernel does not count. */
static double starved(int schedstat) {
    char text[96] = "";
    double ran = 0, waited = 0;
    if (schedstat >= 0 && pread(schedstat, text, sizeof text - 1, 0) > 0) sscanf(text, "%lf %lf", &ran, &waited);
    return waited * 1e-9;
}

static void *open_loop(void *argument) {
    struct loop *loop = argument;
    void *held = NULL;
    if (loop->own) MUST(enter(steady, 0) == SIRE_STATUS_OK);
    MUST(cudaMalloc(&held, 4096) == 0 && cudaFree(held) == 0);
    int schedstat = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    double start = now() + 0.002, before = 0;
    atomic_store(&loop->ready, 1);
    for (long i = 0; loop->count < MOST; i++) {
        double intended = start + (double)i * loop->interval;
        /* A call that is late already was delayed by what delayed the one before, too. */
        if (now() < intended) before = starved(schedstat);
        sleep_until(intended);
        /* At least one pair, whatever was over how fast. */
        int freeing = i & 1, late = intended >= atomic_load(&loop->end) && loop->count > 0;
        if (late && !freeing) break;
        MUST(freeing ? cudaFree(held) == 0 : cudaMalloc(&held, 4096) == 0);
        if (late) break;
        double latency = now() - intended, running = latency - (starved(schedstat) - before);
        loop->latency[freeing][loop->count] = latency * 1e6;
        loop->running[freeing][loop->count] = (running > 0 ? running : 0) * 1e6;
        loop->count += freeing;
    }
    if (schedstat >= 0) close(schedstat);
    if (loop->own) MUST(leave(steady) == SIRE_STATUS_OK);
    return NULL;
}

/* The backup has been elsewhere meanwhile: nothing of `ours` may have changed. */
static void compare(const void *ours, char *host, size_t bytes) {
    memset(host, 0, bytes);
    MUST(cudaMemcpy(host, ours, bytes, 2) == 0);
    for (size_t i = 0; i < bytes / 8; i++) MUST(((uint64_t *)host)[i] == i * 0x9E3779B97F4A7C15u);
}

static void report(const char *beside, const char *whose, struct loop *loop, double seconds) {
    static const char *const CALLS[] = {"allocate", "free"};
    static const struct { const char *name; double share; } MARKS[] = {{"median", 0.5}, {"p99", 0.99}, {"worst", 1.0}};
    char name[200];
    for (int call = 0; call < 2; call++) {
        qsort(loop->latency[call], (size_t)loop->count, sizeof(double), ascending);
        qsort(loop->running[call], (size_t)loop->count, sizeof(double), ascending);
        for (int mark = 0; mark < 3; mark++) {
            snprintf(name, sizeof name, "stall/beside %s/%s/%s/%s", beside, whose, CALLS[call], MARKS[mark].name);
            result(name, quantile(loop->latency[call], loop->count, MARKS[mark].share), "us", loop->count);
            strcat(name, "_running");
            result(name, quantile(loop->running[call], loop->count, MARKS[mark].share), "us", loop->count);
        }
    }
    snprintf(name, sizeof name, "stall/beside %s/%s/seconds", beside, whose);
    result(name, seconds, "s", 1);
}

int main(int argc, char **argv) {
    MUST(argc == 2);
    size_t bytes = (size_t)atoll(argv[1]) << 20;
    sire_status (*open_region)(const char *, const sire_region_options *, uint32_t *) =
        (sire_status(*)(const char *, const sire_region_options *, uint32_t *))sire("sire_region_open");
    sire_status (*pause)(const char *, const sire_pause_options *, sire_report *) =
        (sire_status(*)(const char *, const sire_pause_options *, sire_report *))sire("sire_pause");
    sire_status (*resume)(const char *, const sire_resume_options *, sire_report *) =
        (sire_status(*)(const char *, const sire_resume_options *, sire_report *))sire("sire_resume");
    enter = (sire_status(*)(uint32_t, int32_t))sire("sire_region_enter");
    leave = (sire_status(*)(uint32_t))sire("sire_region_leave");
    MUST(open_region && pause && resume && enter && leave);
    sire_region_options backed = {.struct_size = sizeof backed, .backup = 1, .retain = true};
    uint32_t big = 0;
    MUST(open_region("big", &backed, &big) == SIRE_STATUS_OK && open_region("steady", NULL, &steady) == SIRE_STATUS_OK);
    void *ours = NULL;
    MUST(enter(big, 0) == SIRE_STATUS_OK && cudaMalloc(&ours, bytes) == 0 && leave(big) == SIRE_STATUS_OK);
    char *host = malloc(bytes);
    MUST(host);
    for (size_t i = 0; i < bytes / 8; i++) ((uint64_t *)host)[i] = i * 0x9E3779B97F4A7C15u;
    MUST(cudaMemcpy(ours, host, bytes, 1) == 0);
    /* Once before, so that the backup's memory is there: what is measured is the pause, not the first touch of a page. */
    MUST(pause("big", NULL, NULL) == SIRE_STATUS_OK && resume("big", NULL, NULL) == SIRE_STATUS_OK);

    static struct loop loop;
    static const struct { const char *name; int own; double interval; } KINDS[] = {{"forwarded", 0, 0.001}, {"own", 1, 0.001}, {"seldom", 0, 0.025}};
    static const char *const BESIDE[] = {"nothing", "copy", "pieces", "pause"};
    for (int beside = 0; beside < 4; beside++) {
        for (int kind = 0; kind < 3; kind++) {
            memset(&loop, 0, sizeof loop);
            loop.own = KINDS[kind].own;
            loop.interval = KINDS[kind].interval;
            atomic_store(&loop.end, INFINITY);
            pthread_t thread;
            MUST(pthread_create(&thread, NULL, open_loop, &loop) == 0);
            while (!atomic_load(&loop.ready)) sleep_until(now() + 0.0001);
            double start = now();
            if (beside == 0) sleep_until(start + 0.5);
            if (beside == 1) MUST(cudaMemcpy(host, ours, bytes, 2) == 0);
            if (beside == 2) {
                for (size_t at = 0; at < bytes; at += PIECE) {
                    size_t len = bytes - at < PIECE ? bytes - at : PIECE;
                    MUST(cudaMemcpy(host + at, (char *)ours + at, len, 2) == 0);
                }
            }
            if (beside == 3) MUST(pause("big", NULL, NULL) == SIRE_STATUS_OK);
            double end = now(), seconds = end - start;
            atomic_store(&loop.end, end);
            MUST(pthread_join(thread, NULL) == 0);
            if (beside == 3) {
                MUST(resume("big", NULL, NULL) == SIRE_STATUS_OK);
                compare(ours, host, bytes);
            }
            report(BESIDE[beside], KINDS[kind].name, &loop, seconds);
        }
    }
    return 0;
}
