/* Memory that is short: the API's own error, nothing sticky, nothing lost, and the call can be repeated. The device has 256 MiB. */
#include "support.h"

int main(void) {
    uint32_t region = region_of("big", 1);
    void *ours = allocate_in(region, 150 * MiB), *out = (void *)1;
    fill(ours, 150 * MiB, 1);
    OK(sire_region_enter(region, 0));
    CUDA(2, cudaMalloc(&out, 200 * MiB));
    CHECK(out == (void *)1);
    CUDA(0, cudaGetLastError());
    CUDA(2, cudaMallocAsync(&out, 200 * MiB, NULL));
    EXPECT(SIRE_STATUS_OUT_OF_DEVICE_MEMORY, sire_allocate(200 * MiB, 0, NULL, &out));
    CHECK(sire_torch_pool_malloc(200 * MiB, 0, NULL) == NULL);
    SAYS("big");
    CUDA(0, cudaMalloc(&out, 16 * MiB));
    CUDA(0, cudaFree(out));
    OK(sire_region_leave(region));

    /* While paused, somebody else takes the memory: resume fails whole, keeps the backup, and works afterwards. */
    OK(sire_pause("big", NULL, NULL));
    void *thief = NULL;
    CUDA(0, cudaMalloc(&thief, 180 * MiB));
    uint64_t used = device_used(0);
    sire_resume_options wait = {.struct_size = sizeof wait, .wait_seconds = 0.05};
    EXPECT(SIRE_STATUS_OUT_OF_DEVICE_MEMORY, sire_resume("big", NULL, NULL));
    EXPECT(SIRE_STATUS_OUT_OF_DEVICE_MEMORY, sire_resume("big", &wait, NULL));
    SAYS("big");
    CHECK(device_used(0) == used);
    int32_t state = -1;
    OK(sire_region_state(region, &state));
    CHECK(state == 1);
    CUDA(0, cudaFree(thief));
    OK(sire_resume("big", NULL, NULL));
    CHECK(holds(ours, 150 * MiB, 1));

    /* A margin counts as taken. */
    OK(sire_set_margin(100 * MiB));
    OK(sire_region_enter(region, 0));
    CUDA(2, cudaMalloc(&out, 50 * MiB));
    set_memory_margin_bytes(0);
    CUDA(0, cudaMalloc(&out, 50 * MiB));
    OK(sire_region_leave(region));
    CUDA(0, cudaFree(out));
    CUDA(0, cudaFree(ours));
    return 0;
}
