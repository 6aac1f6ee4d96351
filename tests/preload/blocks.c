/* Very many live blocks in the whole-process allocator, through its own entry points. argv: how many, backup (0 none, 1 host).
 * No two overlap, each keeps what it holds, what was freed is used again without more memory, and a pause takes all of them and brings them back.
 * Prints what was live at most, and nanoseconds per block for making them and for freeing and making half of them again. */
#include "support.h"
#include <time.h>

static size_t count;
static char **at;

static size_t size_of(size_t i) { return 1 + i * 7919 % 1024; }

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

static void make(size_t i) {
    at[i] = sire_torch_malloc((ptrdiff_t)size_of(i), 0, NULL);
    CHECK(at[i] != NULL && (uintptr_t)at[i] % 512 == 0);
}

static int by_address(const void *a, const void *b) {
    const char *first = at[*(const uint32_t *)a], *second = at[*(const uint32_t *)b];
    return first < second ? -1 : first > second;
}

static void apart(void) {
    uint32_t *order = malloc(count * sizeof *order);
    CHECK(order != NULL);
    for (size_t i = 0; i < count; i++) order[i] = (uint32_t)i;
    qsort(order, count, sizeof *order, by_address);
    for (size_t i = 1; i < count; i++) CHECK(at[order[i - 1]] + size_of(order[i - 1]) <= at[order[i]]);
    free(order);
}

static long long figure(const char *name) {
    static char text[1 << 16];
    size_t length = 0;
    OK(sire_memory_stats_json(0, text, sizeof text, &length));
    CHECK(length < sizeof text);
    char *found = strstr(text, name);
    CHECK(found != NULL);
    return atoll(found + strlen(name));
}

#define LIVE figure("\"allocation.all.current\":")
#define RESERVED figure("\"reserved_bytes.all.current\":")

/* Some of them hold something; a prime step, so that all sizes and pieces are among them. */
enum { STEP = 1009 };
static void write_some(unsigned seed) {
    for (size_t i = 0; i < count; i += STEP) fill(at[i], size_of(i), seed + (unsigned)i);
}
static void check_some(unsigned seed) {
    for (size_t i = 0; i < count; i += STEP) CHECK(holds(at[i], size_of(i), seed + (unsigned)i));
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    count = (size_t)atoll(argv[1]);
    int backup = atoi(argv[2]);
    at = calloc(count, sizeof *at);
    CHECK(count > STEP && count % 2 == 0 && count % 3 != 0 && at != NULL);
    uint32_t region = region_of("many", backup);
    OK(sire_region_enter(region, 0));
    double started = now();
    for (size_t i = 0; i < count; i++) make(i);
    double made = now() - started;
    CHECK(LIVE == (long long)count);
    apart();
    write_some(1);

    /* Half of them go and come again, in an order that has nothing to do with their addresses. */
    long long reserved = RESERVED;
    started = now();
    for (size_t i = 0; i < count; i += 2) sire_torch_free(at[i * 3 % count / 2 * 2], 0, 0, NULL), at[i * 3 % count / 2 * 2] = NULL;
    for (size_t i = 0; i < count; i++) if (!at[i]) make(i);
    double again = now() - started;
    CHECK(LIVE == (long long)count && RESERVED == reserved);
    apart();
    for (size_t i = STEP; i < count; i += 2 * STEP) CHECK(holds(at[i], size_of(i), 1 + (unsigned)i));
    OK(sire_region_leave(region));

    /* Every other one is free while the rest is paused: the map of what lives is as ragged as it can be. */
    write_some(2);
    for (size_t i = 1; i < count; i += 2) if (i % STEP) sire_torch_free(at[i], 0, 0, NULL), at[i] = NULL;
    uint64_t used = device_used(0);
    sire_report report = {.struct_size = sizeof report};
    started = now();
    OK(sire_pause("many", NULL, &report));
    CHECK(used > 0 && device_used(0) == 0 && report.allocations == (uint64_t)LIVE);
    OK(sire_resume("many", NULL, NULL));
    double cycle = now() - started;
    if (backup) check_some(2);
    printf("%zu live, %.0f ns to make one, %.0f ns to free and make one, %.0f ns per block for a pause and a resume\n", count, made / (double)count,
        again / (double)(count / 2), cycle / (double)(count / 2));
    for (size_t i = 0; i < count; i++) sire_torch_free(at[i], 0, 0, NULL);
    CHECK(LIVE == 0);
    size_t given = 0;
    OK(sire_empty_cache(&given));
    CHECK(given > 0 && RESERVED == 0 && device_used(0) == 0);
    return 0;
}
