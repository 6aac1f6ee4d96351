/* Two devices: memory of Sire's is where the program's current device was, and a peer that was enabled can use it, before and after a
 * pause, and memory that came before the enabling too. */
#include "support.h"

int main(void) {
    uint32_t region = region_of("both", 1);
    CUDA(0, cudaSetDevice(1));
    void *early = allocate_in(region, 2 * MiB), *early_small = allocate_in(region, 4 * KiB);
    int32_t device = -1;
    OK(sire_allocation(early, NULL, NULL, &device, NULL));
    CHECK(device == 1);
    CUDA(0, cudaSetDevice(0));
    CUDA(0, cudaDeviceEnablePeerAccess(1, 0));
    CHECK(cudaDeviceEnablePeerAccess(1, 0) == 704);
    cudaGetLastError();
    CUDA(0, cudaSetDevice(1));
    void *late = allocate_in(region, 2 * MiB);
    OK(sire_allocation(late, NULL, NULL, &device, NULL));
    CHECK(device == 1);
    fill(early, 2 * MiB, 1);
    fill(late, 2 * MiB, 2);
    fill(early_small, 4 * KiB, 3);
    int (*accessible)(uint64_t, size_t, int, int, int *) =
        (int (*)(uint64_t, size_t, int, int, int *))dlsym(RTLD_DEFAULT, "sire_sim_accessible");
    CHECK(accessible != NULL);
    for (int cycle = 0; cycle < 2; cycle++) {
        void *all[] = {early, late, early_small};
        for (int i = 0; i < 3; i++) {
            int yes = 0;
            CUDA(0, accessible((uint64_t)all[i], 4 * KiB, 0, 1, &yes));
            CHECK(yes == 1);
            CUDA(0, accessible((uint64_t)all[i], 4 * KiB, 1, 1, &yes));
            CHECK(yes == 1);
        }
        uint64_t used[2] = {device_used(0), device_used(1)};
        OK(sire_pause("both", NULL, NULL));
        CHECK(device_used(0) == used[0] && device_used(1) < used[1]);
        OK(sire_resume("both", NULL, NULL));
        CHECK(device_used(1) == used[1]);
        CHECK(holds(early, 2 * MiB, 1) && holds(late, 2 * MiB, 2) && holds(early_small, 4 * KiB, 3));
    }
    OK(sire_allow_peer(1, 0));
    CHECK(sire_allow_peer(1, 9) != SIRE_STATUS_OK);
    CHECK(sire_allow_peer(-1, 0) != SIRE_STATUS_OK);
    CUDA(0, cudaFree(early));
    CUDA(0, cudaFree(late));
    CUDA(0, cudaFree(early_small));
    return 0;
}
