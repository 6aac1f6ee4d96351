/* A program that uses only the second device. Sire once registered host memory in the first device's context: with one process per
 * device, every one of them then took hundreds of megabytes of the first. */
#include "support.h"

static int has_context(int device) {
    int (*state)(int, unsigned *, int *) = (int (*)(int, unsigned *, int *))dlsym(RTLD_DEFAULT, "cuDevicePrimaryCtxGetState");
    CHECK(state != NULL);
    unsigned flags = 0;
    int active = -1;
    CUDA(0, state(device, &flags, &active));
    return active;
}

int main(void) {
    CUDA(0, cudaSetDevice(1));
    uint32_t region = region_of("second", 1);
    void *large = allocate_in(region, 6 * MiB), *small = allocate_in(region, 4 * KiB);
    fill(large, 6 * MiB, 1);
    fill(small, 4 * KiB, 2);
    CHECK(has_context(1) == 1 && has_context(0) == 0);
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(large, 6 * MiB, 1) && holds(small, 4 * KiB, 2));
    CUDA(0, cudaFree(large));
    CUDA(0, cudaFree(small));
    OK(sire_trim(NULL, NULL));
    CHECK(has_context(1) == 1 && has_context(0) == 0);
    return 0;
}
