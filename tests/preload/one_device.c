/* Regions that take what is allocated on one device: the innermost one that takes an allocation's device has it, whichever function makes it. Once it
 * was the innermost region of all, which then held what an allocator had asked for on another device, and would go on handing out. */
#include "support.h"
#include "virtual.h"

/* From a pool of the device's, while another device is the current one. */
static void *from_pool(int device) {
    pool_properties asked = {.kind = 1, .where = {1, device}};
    void *pool = NULL, *out = NULL;
    CUDA(0, cudaMemPoolCreate(&pool, &asked));
    CUDA(0, cudaSetDevice(!device));
    CUDA(0, cudaMallocFromPoolAsync(&out, 2 * MiB, pool, NULL));
    CUDA(0, cudaSetDevice(device));
    return out;
}

/* The region of what is allocated on `device` in one of four ways; UINT32_MAX: none. */
static uint32_t region_on(int device, int way) {
    void *memory = NULL;
    CUDA(0, cudaSetDevice(device));
    if (way == 0) CUDA(0, cudaMalloc(&memory, 2 * MiB));
    if (way == 1) CUDA(0, cudaMallocAsync(&memory, 2 * MiB, NULL));
    if (way == 2) memory = from_pool(device);
    if (way == 3 && sire_allocate(2 * MiB, device, NULL, &memory)) return UINT32_MAX;
    uint32_t region = UINT32_MAX;
    int32_t found = -1;
    sire_status status = sire_allocation(memory, NULL, NULL, &found, &region);
    CHECK(status == (region == UINT32_MAX ? SIRE_STATUS_UNKNOWN_ADDRESS : SIRE_STATUS_OK));
    CHECK(region == UINT32_MAX || found == device);
    CUDA(0, way % 3 == 0 ? cudaFree(memory) : cudaFreeAsync(memory, NULL));
    return region;
}

int main(void) {
    uint32_t outer = region_of("outer", 0), inner = region_of("inner", 0), all = region_of("all", 0);
    for (int way = 0; way < 4; way++) {
        OK(sire_region_enter_on(inner, 1, 0));
        CHECK(region_on(0, way) == UINT32_MAX && region_on(1, way) == inner);
        OK(sire_region_leave(inner));
        OK(sire_region_enter_on(outer, 0, 0));
        OK(sire_region_enter_on(inner, 1, 0));
        CHECK(region_on(0, way) == outer && region_on(1, way) == inner);
        uint32_t current = UINT32_MAX;
        OK(sire_region_current(&current));
        CHECK(current == inner);
        OK(sire_region_enter_on(all, -1, 0));
        CHECK(region_on(0, way) == all && region_on(1, way) == all);
        OK(sire_region_leave(all));
        OK(sire_region_suspend());
        CHECK(region_on(0, way) == UINT32_MAX && region_on(1, way) == UINT32_MAX);
        OK(sire_region_unsuspend());
        OK(sire_region_leave(inner));
        CHECK(region_on(0, way) == outer && region_on(1, way) == UINT32_MAX);
        OK(sire_region_leave(outer));
        /* What no region of the thread's takes is the process's. */
        OK(sire_process_region_set(all));
        OK(sire_region_enter_on(inner, 1, 0));
        CHECK(region_on(0, way) == all && region_on(1, way) == inner);
        OK(sire_region_leave(inner));
        OK(sire_process_region_set(UINT32_MAX));
    }
    return 0;
}
