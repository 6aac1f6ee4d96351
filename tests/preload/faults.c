/* One driver call fails in the middle of a pause or a resume: the call reports it, nothing is lost, and repeating it succeeds. */
#include "support.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    uint32_t region = region_of("fragile", 1);
    void *large = allocate_in(region, 130 * MiB), *small = allocate_in(region, 64 * KiB);
    fill(large, 130 * MiB, 1);
    fill(small, 64 * KiB, 2);
    uint64_t used = device_used(0);
    int failed = 0;
    for (int n = 1; n <= 3; n++) {
        char plan[200];
        snprintf(plan, sizeof plan, "%s#%d=error:999", argv[1], n);
        for (int resume = 0; resume < 2; resume++) {
            device_fault(plan);
            int status = resume ? sire_resume(NULL, NULL, NULL) : sire_pause(NULL, NULL, NULL);
            failed += status != SIRE_STATUS_OK;
            device_fault("");
            if (resume) {
                OK(sire_resume(NULL, NULL, NULL));
                CHECK(holds(large, 130 * MiB, 1) && holds(small, 64 * KiB, 2));
                CHECK(device_used(0) == used);
            } else {
                OK(sire_pause(NULL, NULL, NULL));
                CHECK(device_used(0) < used);
            }
        }
    }
    printf("%d calls failed\n", failed);
    CUDA(0, cudaFree(large));
    CUDA(0, cudaFree(small));
    return 0;
}
