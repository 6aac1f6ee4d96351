/* Region, pause, resume: same addresses, same bytes, and the memory really goes. argv: none | host | disk. */
#include "support.h"

static const size_t SIZES[] = {512, 4 * KiB, 700 * KiB, 3 * MiB, 20 * MiB, 150 * MiB};
enum { COUNT = sizeof SIZES / sizeof *SIZES };

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int backup = !strcmp(argv[1], "host") ? 1 : !strcmp(argv[1], "disk") ? 2 : 0;
    void *outside = NULL;
    CUDA(0, cudaMalloc(&outside, 5 * MiB));
    CHECK(!sire_owns(outside));
    fill(outside, 5 * MiB, 99);

    uint32_t region = region_of("model/weights", backup), other = region_of("other", 1);
    void *ours[COUNT];
    size_t bytes = 0;
    for (int i = 0; i < COUNT; i++) {
        ours[i] = allocate_in(region, SIZES[i]);
        CHECK(sire_owns(ours[i]) && sire_owns((char *)ours[i] + SIZES[i] - 1));
        fill(ours[i], SIZES[i], i);
        bytes += SIZES[i];
    }
    void *neighbour = allocate_in(other, 2 * MiB);
    fill(neighbour, 2 * MiB, 77);

    void *base = NULL;
    size_t size = 0;
    int32_t device = -1;
    uint32_t of = 0;
    OK(sire_allocation((char *)ours[3] + 5, &base, &size, &device, &of));
    CHECK(base == ours[3] && size == SIZES[3] && device == 0 && of == region);
    OK(sire_allocation(ours[3], NULL, NULL, NULL, NULL));

    for (int cycle = 0; cycle < 3; cycle++) {
        uint64_t before = device_used(0);
        size_t free_before = free_bytes();
        sire_report report = {.struct_size = sizeof report};
        OK(sire_pause("model", NULL, &report));
        CHECK(report.regions_changed == 1 && report.allocations == COUNT);
        CHECK(report.bytes_moved == report.bytes_expected && report.bytes_moved >= bytes);
        CHECK(backup ? report.bytes_copied >= bytes && report.bytes_discarded == 0
                     : report.bytes_copied == 0 && report.bytes_discarded >= bytes);
        CHECK(before - device_used(0) == report.bytes_moved);
        /* The program's own view is as truthful: what a pause gave back is free, what a resume took is not. */
        CHECK(free_bytes() - free_before == report.bytes_moved);
        CHECK(report.seconds_total >= report.seconds_transfer && report.seconds_total < 60);
        int32_t state = -1;
        OK(sire_region_state(region, &state));
        CHECK(state == 1);
        for (int i = 0; i < COUNT; i++) CHECK(sire_owns(ours[i]));

        /* Once more changes nothing; the neighbour is not concerned. */
        OK(sire_pause("model/weights", NULL, &report));
        CHECK(report.regions_changed == 0 && report.regions_unchanged == 1 && report.bytes_moved == 0);
        CHECK(holds(neighbour, 2 * MiB, 77) && holds(outside, 5 * MiB, 99));

        OK(sire_resume("model", NULL, &report));
        CHECK(report.regions_changed == 1 && device_used(0) == before);
        CHECK(free_bytes() == free_before);
        OK(sire_region_state(region, &state));
        CHECK(state == 0);
        for (int i = 0; i < COUNT && backup; i++) CHECK(holds(ours[i], SIZES[i], i));
        if (!backup) /* The memory is there again, whatever is in it. */
            for (int i = 0; i < COUNT; i++) fill(ours[i], SIZES[i], i);
        OK(sire_resume(NULL, NULL, NULL));
    }

    /* Free while paused is allowed, and what is left comes back. */
    OK(sire_pause(NULL, NULL, NULL));
    CUDA(0, cudaFree(ours[4]));
    OK(sire_free(ours[0]));
    CHECK(!sire_owns(ours[4]));
    OK(sire_resume(NULL, NULL, NULL));
    for (int i = 1; i < COUNT && backup; i++)
        if (i != 4) CHECK(holds(ours[i], SIZES[i], i));
    CHECK(holds(neighbour, 2 * MiB, 77));
    for (int i = 1; i < COUNT; i++)
        if (i != 4) CUDA(0, cudaFree(ours[i]));
    CUDA(0, cudaFree(neighbour));
    CUDA(0, cudaFree(outside));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    CUDA(0, cudaGetLastError());
    return 0;
}
