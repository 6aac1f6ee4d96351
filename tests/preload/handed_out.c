/* Memory that somebody else has a handle of: a pause leaves it, says so, and counts it; what cannot be handed out is refused by name. */
#include "support.h"

int main(void) {
    int (*retain)(uint64_t *, void *) = NULL, (*release)(uint64_t) = NULL;
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemRetainAllocationHandle", (void **)&retain, 12000, 0, NULL));
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemRelease", (void **)&release, 12000, 0, NULL));
    uint32_t region = region_of("buffers", 1);
    char *shared = allocate_in(region, 4 * MiB), *own = allocate_in(region, 6 * MiB), *small = allocate_in(region, 4 * KiB);
    fill(shared, 4 * MiB, 1);
    fill(own, 6 * MiB, 2);
    fill(small, 4 * KiB, 3);
    uint64_t used = device_used(0), handle = 0;

    CUDA(0, retain(&handle, shared + MiB));
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause("buffers", NULL, &report));
    CHECK(report.bytes_held == 4 * MiB && report.bytes_moved == 8 * MiB && used - device_used(0) == 8 * MiB);
    CHECK(holds(shared, 4 * MiB, 1));
    OK(sire_require_usable(shared));
    EXPECT(SIRE_STATUS_PAUSED, sire_require_usable(own));
    SAYS("region 'buffers', which is paused; resume it first");
    uint64_t other = 0;
    CUDA(800, retain(&other, own));
    CHECK(other == 0);
    OK(sire_resume("buffers", NULL, NULL));
    OK(sire_require_usable(own));
    CHECK(holds(own, 6 * MiB, 2) && holds(small, 4 * KiB, 3));
    CUDA(0, release(handle));

    char ipc[64] = {0};
    CUDA(801, cudaIpcGetMemHandle(ipc, own));
    SAYS("is in region 'buffers', and cudaIpcGetMemHandle cannot hand such memory to another process");
    for (size_t i = 0; i < sizeof ipc; i++) CHECK(ipc[i] == 0);
    void *plain = NULL;
    CUDA(0, cudaMalloc(&plain, 2 * MiB));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_require_usable(plain));
    CUDA(0, cudaIpcGetMemHandle(ipc, plain)); /* outside regions it is the runtime's */
    CHECK(cudaGetLastError() == 0);

    CUDA(0, cudaFree(plain));
    CUDA(0, cudaFree(shared));
    CUDA(0, cudaFree(own));
    CUDA(0, cudaFree(small));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
