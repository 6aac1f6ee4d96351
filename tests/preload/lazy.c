/* Memory of a paused region stays until somebody needs it: inside regions, outside of them, or because it is said. */
#include "support.h"

enum { SIZE = 96 * MiB };

int main(void) {
    uint32_t a = region_of("a", 1), b = region_of("b", 1);
    char *one = allocate_in(a, SIZE);
    fill(one, SIZE, 1);
    sire_pause_options lazily = {.struct_size = sizeof lazily, .release = 1}, wrong = {.struct_size = sizeof wrong, .release = 2};
    sire_report report = {.struct_size = sizeof report};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_pause("a", &wrong, NULL));
    SAYS("release is 2");
    sire_pause_options vouched = {.struct_size = sizeof vouched, .idle = 2};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_pause("a", &vouched, NULL));
    SAYS("idle is 2");
    vouched.idle = 1;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_switch("a", "b", &vouched, NULL, NULL));
    OK(sire_pause("a", &vouched, &report));
    CHECK(report.bytes_copied == SIZE && report.bytes_moved == SIZE && report.seconds_synchronize == 0.0);
    OK(sire_resume("a", NULL, NULL));
    CHECK(holds(one, SIZE, 1));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_switch("a", "b", &lazily, NULL, NULL));

    OK(sire_pause("a", &lazily, &report));
    CHECK(report.bytes_copied == SIZE && report.bytes_moved == 0 && report.bytes_lazy == SIZE && device_used(0) >= SIZE);
    EXPECT(SIRE_STATUS_PAUSED, sire_region_enter(a, 0));
    OK(sire_resume("a", NULL, &report));
    CHECK(report.regions_changed == 1 && report.bytes_copied == 0 && report.bytes_moved == 0 && holds(one, SIZE, 1));

    /* An allocation in a region, then the resume of the first one, and an allocation that is none of Sire's. */
    OK(sire_pause("a", &lazily, NULL));
    char *two = allocate_in(b, SIZE);
    fill(two, SIZE, 2);
    CHECK(device_used(0) < 2 * SIZE);
    OK(sire_pause("b", &lazily, NULL));
    OK(sire_resume("a", NULL, NULL));
    CHECK(holds(one, SIZE, 1) && device_used(0) < 2 * SIZE);
    OK(sire_pause("a", &lazily, NULL));
    void *outside = NULL;
    CUDA(0, cudaMalloc(&outside, SIZE));
    CHECK(cudaGetLastError() == 0);
    CUDA(0, cudaFree(outside));

    OK(sire_resume("b", NULL, NULL));
    CHECK(holds(two, SIZE, 2));
    OK(sire_pause("b", &lazily, NULL));
    OK(sire_pause("b", NULL, &report));
    CHECK(report.bytes_moved == SIZE && report.bytes_copied == 0 && device_used(0) < SIZE);
    OK(sire_resume("a", NULL, NULL));
    CHECK(holds(one, SIZE, 1));
    OK(sire_pause("a", &lazily, NULL));
    size_t given = 0;
    OK(sire_trim(&given, NULL));
    CHECK(given >= SIZE && device_used(0) < SIZE);
    OK(sire_resume("a", NULL, NULL));
    CHECK(holds(one, SIZE, 1));
    return 0;
}
