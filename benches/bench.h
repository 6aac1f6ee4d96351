/* What the benchmark programs share. They do not link Sire: the same program runs with it preloaded and without. */
#ifndef BENCH_H
#define BENCH_H

#define _GNU_SOURCE
#include "../include/sire.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int cudaError;
cudaError cudaMalloc(void **out, size_t bytes);
cudaError cudaFree(void *ptr);
cudaError cudaMemcpy(void *to, const void *from, size_t bytes, int kind);

#define MUST(condition)                                                                     \
    do {                                                                                    \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);   \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

static inline double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* A function of Sire's, or NULL if it is not loaded. */
static inline void *sire(const char *name) { return dlsym(RTLD_DEFAULT, name); }

/* Driver calls made so far, as Sire counts them; 0 without Sire. */
static inline double driver_calls(void) {
    sire_status (*stats)(char *, size_t, size_t *) = (sire_status(*)(char *, size_t, size_t *))sire("sire_stats_json");
    static char text[1 << 16];
    if (!stats || stats(text, sizeof text, NULL) != SIRE_STATUS_OK) return 0;
    const char *found = strstr(text, "\"driver_calls\":");
    return found ? atof(found + strlen("\"driver_calls\":")) : 0;
}

/* One result: a line of JSON. The runner adds what it knows (device, whether it is simulated). */
static inline void result(const char *name, double value, const char *unit, long samples) {
    printf("{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", \"samples\": %ld}\n", name, value, unit, samples);
    fflush(stdout);
}

static inline int ascending(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* The value below which this share of the sorted samples lies. */
static inline double quantile(const double *sorted, long count, double share) {
    long at = (long)(share * (double)count);
    return sorted[at < count ? at : count - 1];
}

#endif
