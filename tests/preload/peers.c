/* Two devices: memory of Sire's is where the program's current device was, and a peer that was enabled can use it, before and after a
 * pause, and memory that came before the enabling too. What is taken back is gone, now and after a pause; each way to give access counts by itself. */
#include "support.h"

static int (*accessible)(uint64_t, size_t, int, int, int *);

static int may(int device, void *memory) {
    int yes = -1;
    CUDA(0, accessible((uint64_t)memory, 4 * KiB, device, 1, &yes));
    return yes;
}

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
    *(void **)&accessible = dlsym(RTLD_DEFAULT, "sire_sim_accessible");
    CHECK(accessible != NULL);
    for (int cycle = 0; cycle < 2; cycle++) {
        void *all[] = {early, late, early_small};
        for (int i = 0; i < 3; i++) {
            CHECK(may(0, all[i]) == 1 && may(1, all[i]) == 1);
        }
        uint64_t used[2] = {device_used(0), device_used(1)};
        OK(sire_pause("both", NULL, NULL));
        CHECK(device_used(0) == used[0] && device_used(1) < used[1]);
        OK(sire_resume("both", NULL, NULL));
        CHECK(device_used(1) == used[1]);
        CHECK(holds(early, 2 * MiB, 1) && holds(late, 2 * MiB, 2) && holds(early_small, 4 * KiB, 3));
    }
    /* Taken back while it is there. The device that asks is the current one: device 1 takes nothing back of what device 0 has. */
    CUDA(0, cudaSetDevice(1));
    CHECK(cudaDeviceDisablePeerAccess(0) == 705);
    cudaGetLastError();
    CHECK(may(0, late) == 1);
    CUDA(0, cudaSetDevice(0));
    device_fault("cudaDeviceDisablePeerAccess=error:999");
    CHECK(cudaDeviceDisablePeerAccess(1) == 999);
    device_fault("");
    cudaGetLastError();
    CHECK(may(0, late) == 1);
    CUDA(0, cudaDeviceDisablePeerAccess(1));
    void *all[] = {early, late, early_small};
    for (int i = 0; i < 3; i++) CHECK(may(0, all[i]) == 0 && may(1, all[i]) == 1);
    CHECK(cudaDeviceDisablePeerAccess(1) == 705);
    cudaGetLastError();
    OK(sire_pause("both", NULL, NULL));
    OK(sire_resume("both", NULL, NULL));
    for (int i = 0; i < 3; i++) CHECK(may(0, all[i]) == 0 && may(1, all[i]) == 1);
    /* Taken back while it is away. */
    CUDA(0, cudaDeviceEnablePeerAccess(1, 0));
    CHECK(may(0, late) == 1);
    OK(sire_pause("both", NULL, NULL));
    CUDA(0, cudaDeviceDisablePeerAccess(1));
    OK(sire_resume("both", NULL, NULL));
    CUDA(0, cudaSetDevice(1));
    void *latest = allocate_in(region, 2 * MiB);
    CUDA(0, cudaSetDevice(0));
    for (int i = 0; i < 3; i++) CHECK(may(0, all[i]) == 0);
    CHECK(may(0, latest) == 0 && may(1, latest) == 1);
    CUDA(0, cudaFree(latest));
    /* What was asked of Sire itself stays, whatever CUDA's calls take back. */
    OK(sire_allow_peer(1, 0));
    CHECK(may(0, early) == 1);
    CUDA(0, cudaDeviceEnablePeerAccess(1, 0));
    CUDA(0, cudaDeviceDisablePeerAccess(1));
    CHECK(may(0, early) == 1 && may(0, early_small) == 1);
    CHECK(sire_allow_peer(1, 9) != SIRE_STATUS_OK);
    CHECK(sire_allow_peer(-1, 0) != SIRE_STATUS_OK);
    CUDA(0, cudaFree(early));
    CUDA(0, cudaFree(late));
    CUDA(0, cudaFree(early_small));
    return 0;
}
