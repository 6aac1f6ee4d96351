/* A backup is made while the program goes on; the pause copies what has changed since. */
#include "support.h"

enum { SIZE = 96 * MiB, PAGE = 2 * MiB };

static uint32_t clean_region(const char *tag, int clean) {
    sire_region_options options = {.struct_size = sizeof options, .backup = 1, .clean = clean};
    uint32_t region = UINT32_MAX;
    OK(sire_region_open(tag, &options, &region));
    return region;
}

int main(void) {
    uint32_t weights = clean_region("weights", 1), state = clean_region("state", 2), plain = region_of("plain", 1);
    char *fixed = allocate_in(weights, SIZE), *moving = allocate_in(state, SIZE), *other = allocate_in(plain, MiB);
    fill(fixed, SIZE, 1);
    fill(moving, SIZE, 2);
    fill(other, MiB, 3);
    sire_report report = {.struct_size = sizeof report};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_pre_copy("plain", NULL));
    SAYS("immutable");
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_pre_copy("nobody", NULL));
    OK(sire_pre_copy("weights", &report));
    CHECK(report.bytes_copied == SIZE && report.regions_changed == 1);
    OK(sire_pre_copy("state", NULL));
    CHECK(device_used(0) >= 2 * SIZE && holds(fixed, SIZE, 1) && holds(moving, SIZE, 2));
    fill(moving + 8 * PAGE, PAGE, 4);
    OK(sire_pause("weights", NULL, &report));
    CHECK(report.bytes_copied == 0 && report.bytes_clean == SIZE);
    OK(sire_pause("state", NULL, &report));
    CHECK(report.bytes_copied == PAGE && report.bytes_clean == SIZE - PAGE);
    OK(sire_pre_copy("weights", &report));
    CHECK(report.regions_unchanged == 1 && report.bytes_copied == 0);
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(fixed, SIZE, 1) && holds(moving, 8 * PAGE, 2) && holds(moving + 8 * PAGE, PAGE, 4) && holds(other, MiB, 3));
    CUDA(0, cudaFree(fixed));
    CUDA(0, cudaFree(moving));
    return 0;
}
