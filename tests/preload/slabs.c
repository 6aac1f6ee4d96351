/* SIRE_SLABS=1: cudaMalloc in a region comes from the cache: many small pieces share memory, what is freed is used again after the device
   has come to rest, and a pause takes it as any other. */
#include "support.h"

enum { COUNT = 300, SIZE = 3 * MiB };

int main(void) {
    uint32_t region = region_of("a", 1);
    char *small[COUNT];
    for (int i = 0; i < COUNT; i++) {
        small[i] = allocate_in(region, 1000);
        fill(small[i], 1000, i % 100);
    }
    CHECK(device_used(0) <= 4 * MiB);
    char *large = allocate_in(region, SIZE);
    fill(large, SIZE, 7);
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause("a", NULL, &report));
    CHECK(report.allocations == COUNT + 1 && report.bytes_copied >= SIZE + COUNT * 1000 && report.bytes_copied < SIZE + MiB);
    CHECK(device_used(0) == 0);
    OK(sire_resume("a", NULL, NULL));
    for (int i = 0; i < COUNT; i++) CHECK(holds(small[i], 1000, i % 100));
    CHECK(holds(large, SIZE, 7));

    /* cudaFree does not say which streams have used the memory; the next allocation that finds nothing else waits for the device. */
    CUDA(0, cudaFree(large));
    char *again = allocate_in(region, SIZE);
    CHECK(again == large && device_used(0) <= 8 * MiB);
    CHECK(cudaFree(again + 512) != 0);
    CUDA(0, cudaFree(again));
    for (int i = 0; i < COUNT; i++) CUDA(0, cudaFree(small[i]));
    size_t given = 0;
    OK(sire_empty_cache(&given));
    CHECK(given > SIZE && device_used(0) == 0);
    char text[64];
    size_t length = 0;
    OK(sire_memory_stats_json(0, text, sizeof text, &length));
    CHECK(length > 1000 && strlen(text) == sizeof text - 1);
    OK(sire_memory_stats_reset(0, true));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_memory_stats_json(-1, NULL, 0, NULL));
    OK(sire_memory_snapshot_json(text, sizeof text, &length));
    CHECK(strcmp(text, "[]") == 0 && length == 2);
    return 0;
}
