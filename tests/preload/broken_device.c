/* Of two devices one cannot be asked what it can do. Sire once refused both. argv: the broken device, then words of what is said of it. */
#include "support.h"

int main(int argc, char **argv) {
    CHECK(argc == 3);
    int broken = atoi(argv[1]), fine = 1 - broken;
    uint32_t region = region_of("model", 1);
    CUDA(0, cudaSetDevice(fine));
    void *ours = allocate_in(region, 6 * MiB);
    fill(ours, 6 * MiB, 1);
    uint64_t used = device_used(fine);

    void *none = NULL;
    CUDA(0, cudaSetDevice(broken));
    OK(sire_region_enter(region, 0));
    CHECK(cudaMalloc(&none, 4 * MiB) != 0 && none == NULL);
    SAYS(argv[2]);
    CHECK(cudaMalloc(&none, 4 * KiB) != 0 && none == NULL);
    OK(sire_region_leave(region));

    CUDA(0, cudaSetDevice(fine));
    OK(sire_pause("model", NULL, NULL));
    CHECK(used - device_used(fine) >= 6 * MiB);
    OK(sire_resume("model", NULL, NULL));
    CHECK(holds(ours, 6 * MiB, 1));
    CUDA(0, cudaFree(ours));
    return 0;
}
