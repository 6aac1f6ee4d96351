/* The program says which memory holds nothing: it is not copied, everything else is, and a wrong answer harms nobody. */
#include "support.h"

enum { SIZE = 8 * MiB };

static char *base;
static void *victim;
static sire_range ranges[4];
static int calls;

/* The context is the status to return. */
static int32_t answer(void *context, const uint32_t *regions, size_t count, const sire_range **out, size_t *out_count) {
    calls++;
    CHECK(count == 1 && regions[0] != UINT32_MAX);
    ranges[0] = (sire_range){base + 1 * MiB, 2 * MiB};
    ranges[1] = (sire_range){base + 5 * MiB, 1 * MiB};
    ranges[2] = (sire_range){base - 64 * MiB, 1 * MiB};
    ranges[3] = (sire_range){base + 7 * MiB, (size_t)-1};
    *out = ranges;
    *out_count = 4;
    if (victim) CUDA(0, cudaFree(victim));
    victim = NULL;
    return (int32_t)(intptr_t)context;
}

static int32_t nothing(void *context, const uint32_t *regions, size_t count, const sire_range **out, size_t *out_count) {
    (void)regions, (void)count;
    *out = context;
    *out_count = 7;
    return 0;
}

int main(void) {
    uint32_t region = region_of("pool", 1), state = 9;
    base = allocate_in(region, SIZE);
    victim = allocate_in(region, 2 * MiB);
    fill(base, SIZE, 1);
    sire_pause_options options = {.struct_size = sizeof options, .dead_ranges = answer, .dead_ranges_context = (void *)(intptr_t)SIRE_STATUS_BUSY};
    sire_report report = {.struct_size = sizeof report};
    EXPECT(SIRE_STATUS_BUSY, sire_pause("pool", &options, &report));
    SAYS("dead_ranges");
    OK(sire_region_state(region, (int32_t *)&state));
    CHECK(state == 0 && victim == NULL && holds(base, SIZE, 1));
    options.dead_ranges_context = (void *)(intptr_t)4711;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_pause("pool", &options, NULL));

    options.dead_ranges_context = NULL;
    OK(sire_pause("pool", &options, &report));
    CHECK(report.bytes_dead == 4 * MiB && report.bytes_copied == 4 * MiB && report.bytes_discarded == 0);
    CHECK(report.bytes_moved == SIZE && device_used(0) == 0 && calls == 3);
    OK(sire_pause("pool", &options, NULL));
    CHECK(calls == 3);
    OK(sire_resume("pool", NULL, &report));
    CHECK(report.bytes_copied == 4 * MiB);
    unsigned char *found = malloc(SIZE);
    CUDA(0, cudaMemcpy(found, base, SIZE, TO_HOST));
    for (size_t i = 0; i < SIZE; i++) {
        int dead = (i >= 1 * MiB && i < 3 * MiB) || (i >= 5 * MiB && i < 6 * MiB) || i >= 7 * MiB;
        CHECK(dead || found[i] == byte_at(1, i));
    }
    free(found);

    /* NULL with a count, and a struct that ends before the context. */
    fill(base, SIZE, 2);
    options = (sire_pause_options){.struct_size = sizeof options, .dead_ranges = nothing};
    OK(sire_pause("pool", &options, &report));
    CHECK(report.bytes_dead == 0 && report.bytes_copied == SIZE);
    OK(sire_resume("pool", NULL, NULL));
    options = (sire_pause_options){.struct_size = sizeof options, .dead_ranges = nothing, .dead_ranges_context = (char *)ranges + 1};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_pause("pool", &options, NULL));
    options = (sire_pause_options){.struct_size = offsetof(sire_pause_options, dead_ranges), .dead_ranges = answer};
    OK(sire_pause("pool", &options, &report));
    CHECK(report.bytes_dead == 0 && calls == 3);
    OK(sire_resume("pool", NULL, NULL));
    CHECK(holds(base, SIZE, 2));
    CUDA(0, cudaFree(base));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
