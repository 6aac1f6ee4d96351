/* A program that knows nothing of Sire, under SIRE_REGION: its memory is in that region, and can be paused from outside its code.
 * argv: the tag, or blind (with expandable segments), or disabled. */
#include "support.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    if (!strcmp(argv[1], "blind")) {
        /* PyTorch's memory goes past us, so "everything" would be nothing: an error, not a success. */
        EXPECT(SIRE_STATUS_UNSUPPORTED, sire_pause(NULL, NULL, NULL));
        SAYS("expandable_segments");
        EXPECT(SIRE_STATUS_UNSUPPORTED, sire_resume(NULL, NULL, NULL));
        return 0;
    }
    if (!strcmp(argv[1], "disabled")) {
        EXPECT(SIRE_STATUS_INACTIVE, sire_region_open("r", NULL, NULL));
        SAYS("Sire is not active here: SIRE_DISABLE is set");
        return 0;
    }
    void *ours = NULL, *async = NULL;
    CUDA(0, cudaMalloc(&ours, 3 * MiB));
    CUDA(0, cudaMallocAsync(&async, 2 * MiB, NULL));
    CHECK(sire_owns(ours) && sire_owns(async));
    fill(ours, 3 * MiB, 6);
    uint64_t used = device_used(0);
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause(argv[1], NULL, &report));
    CHECK(device_used(0) < used && report.bytes_copied >= 5 * MiB);
    /* An allocation under a paused region is refused, not served from elsewhere. */
    void *more = NULL;
    CHECK(cudaMalloc(&more, MiB) == 800 && more == NULL);
    SAYS(argv[1]);
    OK(sire_resume(argv[1], NULL, NULL));
    CHECK(holds(ours, 3 * MiB, 6));
    CUDA(0, cudaFreeAsync(async, NULL));
    CUDA(0, cudaFree(ours));
    char json[8192];
    OK(sire_stats_json(json, sizeof json, NULL));
    CHECK(strstr(json, argv[1]) && strstr(json, "\"hook_live\":true") && strstr(json, "\"driver_calls\":"));
    return 0;
}
