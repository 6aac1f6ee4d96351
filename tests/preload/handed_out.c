/* Memory that somebody else has a handle of: a pause leaves it, says so, and counts it; what cannot be handed out is refused by name. */
#include "support.h"
#include "virtual.h"

/* Bound to a multicast object, as NVLink's reductions want it: it stays, and that is said. The software device has no such objects. */
static void multicast(void) {
    int (*bind)(uint64_t, size_t, uint64_t, size_t, size_t, unsigned long long) = NULL;
    int (*bind_address)(uint64_t, size_t, uint64_t, size_t, unsigned long long) = NULL;
    int (*reserve)(uint64_t *, size_t, size_t, uint64_t, unsigned long long) = NULL, (*create)(uint64_t *, size_t, const properties *, unsigned long long) = NULL;
    int (*map)(uint64_t, size_t, size_t, uint64_t, unsigned long long) = NULL, (*set_access)(uint64_t, size_t, const permission *, size_t) = NULL;
    struct { const char *name; void *place; } wanted[] = {{"cuMulticastBindMem", &bind}, {"cuMulticastBindAddr", &bind_address}, {"cuMemAddressReserve", &reserve},
        {"cuMemCreate", &create}, {"cuMemMap", &map}, {"cuMemSetAccess", &set_access}};
    for (int i = 0; i < 6; i++) {
        CUDA(0, cudaGetDriverEntryPointByVersion(wanted[i].name, wanted[i].place, 12010, 0, NULL));
        CHECK(*(void **)wanted[i].place != NULL);
    }
    uint32_t region = region_of("reductions", 1);
    uint64_t base = 0, handle = 0;
    properties asked = {.kind = 1, .handle_types = 1, .where = {1, 0}};
    permission own = {{1, 0}, 3};
    CUDA(0, reserve(&base, 4 * MiB, 0, 0, 0));
    OK(sire_region_enter(region, 0));
    CUDA(0, create(&handle, 4 * MiB, &asked, 0));
    CUDA(0, map(base, 4 * MiB, 0, handle, 0));
    CUDA(0, set_access(base, 4 * MiB, &own, 1));
    OK(sire_region_leave(region));
    char *bound = allocate_in(region, 2 * MiB), *paused = allocate_in(region, 6 * MiB);
    CUDA(801, bind(1, 0, handle, 0, 4 * MiB, 0));
    CUDA(801, bind_address(1, 0, (uint64_t)bound, 2 * MiB, 0));
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause("reductions", NULL, &report));
    CHECK(report.bytes_held == 6 * MiB && report.bytes_moved == 6 * MiB);
    CUDA(800, bind_address(1, 0, (uint64_t)paused, 2 * MiB, 0)); /* what is away cannot be bound */
    SAYS("resume its region first");
    OK(sire_resume("reductions", NULL, NULL));
    CUDA(0, cudaFree(bound));
    CUDA(0, cudaFree(paused));
}

int main(void) {
    multicast();
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
    CHECK(device_used(0) == 4 * MiB); /* what is bound */
    return 0;
}
