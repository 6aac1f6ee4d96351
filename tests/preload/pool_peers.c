/* Access for a peer that the program said in other words than cudaDeviceEnablePeerAccess: to the pool of a device's cudaMallocAsync, and to
 * memory that it maps itself. It holds for what Sire gives in their place, before and after pauses. */
#include "support.h"
#include "virtual.h"

static int (*accessible)(uint64_t, size_t, int, int, int *);

/* The device works on the memory: fills it there, and copies from it. */
static void used_by(int device, char *memory, size_t bytes, int value) {
    unsigned char seen[KiB];
    int yes = 0;
    CUDA(0, accessible((uint64_t)memory, bytes, device, 1, &yes));
    CHECK(yes == 1);
    CUDA(0, cudaSetDevice(device));
    CUDA(0, cudaMemset(memory, value, bytes));
    CUDA(0, cudaDeviceSynchronize());
    CUDA(0, cudaMemcpy(seen, memory + bytes - KiB, KiB, TO_HOST));
    for (int i = 0; i < KiB; i++) CHECK(seen[i] == value);
    CUDA(0, cudaSetDevice(0));
}

int main(void) {
    *(void **)&accessible = dlsym(RTLD_DEFAULT, "sire_sim_accessible");
    CHECK(accessible != NULL);
    uint32_t region = region_of("shared", 1);
    void *pool = NULL, *other_pool = NULL, *early = NULL, *late = NULL;
    int yes = 1;
    OK(sire_region_enter(region, 0));
    CUDA(0, cudaMallocAsync(&early, 4 * MiB, NULL));
    CHECK(sire_owns(early));
    CUDA(0, accessible((uint64_t)early, 4 * MiB, 1, 1, &yes));
    CHECK(yes == 0);
    CUDA(0, cudaDeviceGetDefaultMemPool(&pool, 0));
    CUDA(0, cudaDeviceGetDefaultMemPool(&other_pool, 1));
    /* Another device's pool, no access, access to one's own, and a call that fails: none of them is access to this memory. */
    permission access = {{1, 1}, 0}, own = {{1, 0}, 3}, wrong = {{1, 9}, 3};
    CUDA(0, cudaMemPoolSetAccess(pool, &access, 1));
    CUDA(0, cudaMemPoolSetAccess(pool, &own, 1));
    CUDA(0, cudaMemPoolSetAccess(other_pool, &own, 1));
    CHECK(cudaMemPoolSetAccess(pool, &wrong, 1) != 0);
    access.flags = 3;
    device_fault("cudaMemPoolSetAccess=error:999");
    CHECK(cudaMemPoolSetAccess(pool, &access, 1) == 999);
    CHECK(cudaGetLastError() == 999);
    device_fault("cudaDeviceGetMemPool=error:801; cudaDeviceGetDefaultMemPool=error:801");
    CUDA(0, cudaMemPoolSetAccess(other_pool, &own, 1)); /* whose pool it is cannot be found out: nobody's */
    device_fault("");
    CHECK(cudaGetLastError() == 0); /* what Sire asked is no error of the program's */
    CUDA(0, accessible((uint64_t)early, 4 * MiB, 1, 1, &yes));
    CHECK(yes == 0);
    CUDA(0, cudaMemPoolSetAccess(pool, &access, 1));
    CUDA(0, cudaMallocAsync(&late, 4 * MiB, NULL));

    /* Memory that the program maps itself, with access for both devices, one after the other. */
    int (*reserve)(uint64_t *, size_t, size_t, uint64_t, unsigned long long), (*create)(uint64_t *, size_t, const properties *, unsigned long long);
    int (*map)(uint64_t, size_t, size_t, uint64_t, unsigned long long), (*set_access)(uint64_t, size_t, const permission *, size_t);
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemAddressReserve", (void **)&reserve, 12000, 0, NULL));
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemCreate", (void **)&create, 12000, 0, NULL));
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemMap", (void **)&map, 12000, 0, NULL));
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemSetAccess", (void **)&set_access, 12000, 0, NULL));
    uint64_t mapped = 0, physical = 0;
    properties asked = {.kind = 1, .where = {1, 0}};
    CUDA(0, reserve(&mapped, 4 * MiB, 0, 0, 0));
    CUDA(0, create(&physical, 4 * MiB, &asked, 0));
    CUDA(0, map(mapped, 4 * MiB, 0, physical, 0));
    CUDA(0, set_access(mapped, 4 * MiB, &own, 1));
    CUDA(0, set_access(mapped, 4 * MiB, &access, 1));
    OK(sire_region_leave(region));

    char *all[] = {early, late, (char *)mapped};
    for (int cycle = 0; cycle < 3; cycle++) {
        for (int i = 0; i < 3; i++) {
            used_by(1, all[i], 4 * MiB, 16 * cycle + i + 1);
            int seen = 0;
            CUDA(0, cudaMemcpyPeer(late, 0, all[i], 1, 4));
            CUDA(0, cudaMemcpy(&seen, late, 4, TO_HOST));
            CHECK((seen & 0xff) == 16 * cycle + i + 1);
        }
        used_by(0, all[1], 4 * MiB, 99);
        uint64_t used = device_used(0);
        OK(sire_pause("shared", NULL, NULL));
        CHECK(used - device_used(0) == 12 * MiB);
        OK(sire_resume("shared", NULL, NULL));
        for (int i = 0; i < 3; i++) {
            unsigned char byte = 0;
            CUDA(0, cudaMemcpy(&byte, all[i] + MiB, 1, TO_HOST));
            CHECK(byte == (i == 1 ? 99 : 16 * cycle + i + 1));
        }
    }
    /* Taken back from the pool: the memory in its place follows; what the program maps itself is another matter. Peer access and the pool's
     * count each by itself. */
    permission none = {{1, 1}, 0};
    CUDA(0, cudaSetDevice(1));
    int code = cudaDeviceEnablePeerAccess(0, 0);
    CHECK(code == 0 || code == 704); /* the software device takes access to the pool for it */
    cudaGetLastError();
    CUDA(0, cudaSetDevice(0));
    CUDA(0, cudaMemPoolSetAccess(pool, &none, 1));
    used_by(1, late, 4 * MiB, 5);
    CUDA(0, cudaMemPoolSetAccess(pool, &access, 1));
    CUDA(0, cudaSetDevice(1));
    CUDA(0, cudaDeviceDisablePeerAccess(0));
    CUDA(0, cudaSetDevice(0));
    used_by(1, late, 4 * MiB, 6);
    CUDA(0, cudaMemPoolSetAccess(pool, &none, 1));
    for (int cycle = 0; cycle < 2; cycle++) {
        for (int i = 0; i < 3; i++) {
            CUDA(0, accessible((uint64_t)all[i], 4 * MiB, 1, 1, &yes));
            CHECK(yes == (i == 2));
            CUDA(0, accessible((uint64_t)all[i], 4 * MiB, 0, 1, &yes));
            CHECK(yes == 1);
        }
        OK(sire_pause("shared", NULL, NULL));
        OK(sire_resume("shared", NULL, NULL));
    }
    CUDA(0, cudaFreeAsync(early, NULL));
    CUDA(0, cudaFreeAsync(late, NULL));
    return 0;
}
