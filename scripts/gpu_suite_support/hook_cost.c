/* What one cudaMalloc and one cudaFree cost: run once plain and once with the library preloaded, and compare.
 *
 *   hook_cost [OPERATIONS]
 *
 * Prints one JSON object. `outside`: outside any region (with the library: passed through). `inside`: in a region, for small
 * and for large allocations. `live.N`: outside and inside, while N other allocations are alive. Built against any libcudart.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

extern int cudaMalloc(void **out, size_t bytes);
extern int cudaFree(void *pointer);

struct region_options { size_t struct_size; int32_t backup; bool zero_fill, retain; };
static int (*region_open)(const char *, const struct region_options *, uint32_t *);
static int (*region_enter)(uint32_t, int32_t);
static int (*region_leave)(uint32_t);
static int (*stats_json)(char *, size_t, size_t *);

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void must(int status, const char *what) {
    if (status != 0) {
        fprintf(stderr, "hook_cost: %s failed with %d\n", what, status);
        exit(1);
    }
}

/* Calls that Sire has made to the driver so far; 0 without Sire. */
static long long driver_calls(void) {
    static char text[1 << 20];
    size_t length = 0;
    if (stats_json == NULL || stats_json(text, sizeof text, &length) != 0) return 0;
    const char *at = strstr(text, "\"driver_calls\":");
    return at != NULL ? atoll(at + strlen("\"driver_calls\":")) : 0;
}

static int by_size(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Medians over `count` pairs of malloc and free. */
static void pairs(const char *name, int count, size_t bytes) {
    uint64_t *taken = malloc(sizeof *taken * (size_t)count), *given = malloc(sizeof *given * (size_t)count);
    void *pointer = NULL;
    if (taken == NULL || given == NULL) exit(1);
    must(cudaMalloc(&pointer, bytes), "cudaMalloc");
    must(cudaFree(pointer), "cudaFree");
    long long calls = driver_calls();
    for (int i = 0; i < count; i++) {
        uint64_t start = now();
        must(cudaMalloc(&pointer, bytes), "cudaMalloc");
        uint64_t middle = now();
        must(cudaFree(pointer), "cudaFree");
        taken[i] = middle - start;
        given[i] = now() - middle;
    }
    calls = driver_calls() - calls;
    qsort(taken, (size_t)count, sizeof *taken, by_size);
    qsort(given, (size_t)count, sizeof *given, by_size);
    printf("\"%s\": {\"malloc_ns\": %llu, \"free_ns\": %llu, \"malloc_p99_ns\": %llu, \"free_p99_ns\": %llu, "
           "\"driver_calls_per_pair\": %.3f, \"samples\": %d}, ",
           name, (unsigned long long)taken[count / 2], (unsigned long long)given[count / 2],
           (unsigned long long)taken[count * 99 / 100], (unsigned long long)given[count * 99 / 100], (double)calls / count, count);
    free(taken);
    free(given);
}

/* The same while `live` small allocations exist. */
static void crowded(const char *where, int live, int count) {
    void **held = calloc((size_t)live, sizeof *held);
    char name[64];
    int got = 0;
    if (held == NULL) exit(1);
    while (got < live && cudaMalloc(&held[got], 512) == 0) got++;
    /* A device that was full first: leave room for what is measured. */
    for (int spare = 16; got < live && got > 0 && spare > 0; spare--) must(cudaFree(held[--got]), "cudaFree");
    snprintf(name, sizeof name, "%s.small.live_%d", where, got);
    pairs(name, count, 4096);
    while (got > 0) must(cudaFree(held[--got]), "cudaFree");
    free(held);
}

int main(int argc, char **argv) {
    int count = argc > 1 ? atoi(argv[1]) : 1000;
    uint32_t region = 0;
    *(void **)&region_open = dlsym(RTLD_DEFAULT, "sire_region_open");
    *(void **)&region_enter = dlsym(RTLD_DEFAULT, "sire_region_enter");
    *(void **)&region_leave = dlsym(RTLD_DEFAULT, "sire_region_leave");
    *(void **)&stats_json = dlsym(RTLD_DEFAULT, "sire_stats_json");
    bool sire = region_open != NULL && region_enter != NULL && region_leave != NULL;

    must(cudaFree(NULL), "cudaFree(NULL)");
    printf("{");
    pairs("outside.small", count, 4096);
    pairs("outside.large", count / 10 + 1, 8u << 20);
    crowded("outside", 1000, count);
    crowded("outside", 100000, count);
    if (sire) {
        struct region_options options = {.struct_size = sizeof options};
        must(region_open("hook_cost", &options, &region), "sire_region_open");
        must(region_enter(region, 0), "sire_region_enter");
        pairs("inside.small", count, 4096);
        pairs("inside.large", count / 10 + 1, 8u << 20);
        crowded("inside", 1000, count);
        crowded("inside", 100000, count);
        must(region_leave(region), "sire_region_leave");
    }
    printf("\"sire\": %s}\n", sire ? "true" : "false");
    return 0;
}
