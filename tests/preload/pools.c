/* The runtime's own memory pools, made by the program: what is taken from them inside a region is the region's, and access to them is access to that,
 * whether a pool is its device's current one or not. */
#include "support.h"
#include "virtual.h"

static int (*accessible)(uint64_t, size_t, int, int, int *);
static const permission given = {{1, 1}, 3}, none = {{1, 1}, 0};

static int is_open_to_1(const void *memory) {
    int yes = -1;
    CUDA(0, accessible((uint64_t)memory, 2 * MiB, 1, 1, &yes));
    CHECK(yes == 0 || yes == 1);
    return yes;
}

static void *pool_of_kind(int kind, int device, int handle_types) {
    pool_properties asked = {.kind = kind, .handle_types = handle_types, .where = {1, device}};
    void *pool = NULL;
    CUDA(0, cudaMemPoolCreate(&pool, &asked));
    CHECK(pool != NULL);
    return pool;
}

static void *pool_of(int device, int handle_types) { return pool_of_kind(1, device, handle_types); }

/* Inside the region from the pool; whose memory it is. */
static void *taken(uint32_t region, void *pool, size_t bytes, int ours) {
    void *out = NULL;
    OK(sire_region_enter(region, 0));
    CUDA(0, cudaMallocFromPoolAsync(&out, bytes, pool, NULL));
    OK(sire_region_leave(region));
    CHECK(out != NULL && sire_owns(out) == ours);
    return out;
}

static void memory(uint32_t region) {
    void *own = pool_of(0, 0), *beside = pool_of(1, 0), *shared = pool_of(0, 1), *plain = NULL, *default_pool = NULL;
    CUDA(0, cudaDeviceGetDefaultMemPool(&default_pool, 0));
    CUDA(0, cudaMallocFromPoolAsync(&plain, 2 * MiB, own, NULL));
    CHECK(!sire_owns(plain));
    char *all[] = {taken(region, own, 2 * MiB, 1), taken(region, default_pool, 4 * MiB, 1), taken(region, beside, 6 * MiB, 1)};
    int32_t device = -1;
    OK(sire_allocation(all[2], NULL, NULL, &device, NULL));
    CHECK(device == 1); /* the pool's, not the thread's current one */
    void *exported = taken(region, shared, 2 * MiB, 0); /* other processes may be given it */
    void *managed_pool = pool_of_kind(2, 0, 0), *managed = taken(region, managed_pool, 2 * MiB, 0); /* the host may touch it */
    CUDA(0, cudaFreeAsync(managed, NULL));
    CUDA(0, cudaMemPoolDestroy(managed_pool));
    for (int i = 0; i < 2; i++) fill(all[i], 2 * MiB, i);
    uint64_t used[] = {device_used(0), device_used(1)};
    OK(sire_pause("pools", NULL, NULL));
    CHECK(used[0] - device_used(0) == 6 * MiB && used[1] - device_used(1) == 6 * MiB);
    OK(sire_region_enter(region, 1)); /* resumes */
    OK(sire_region_leave(region));
    for (int i = 0; i < 2; i++) CHECK(holds(all[i], 2 * MiB, i));
    for (int i = 0; i < 3; i++) CUDA(0, cudaFreeAsync(all[i], NULL));
    CUDA(0, cudaFreeAsync(exported, NULL));
    CUDA(0, cudaFreeAsync(plain, NULL));
    /* What CUDA says of no place, no bytes and no pool, it says itself; a pool that is gone is not known any more. */
    OK(sire_region_enter(region, 0));
    CHECK(cudaMallocFromPoolAsync(NULL, MiB, own, NULL) != 0);
    CHECK(cudaMallocFromPoolAsync(&plain, MiB, NULL, NULL) != 0);
    CUDA(0, cudaMemPoolDestroy(own));
    CHECK(cudaMallocFromPoolAsync(&plain, MiB, own, NULL) != 0);
    OK(sire_region_leave(region));
    CUDA(0, cudaMemPoolDestroy(beside));
    CUDA(0, cudaMemPoolDestroy(shared));
    CHECK(cudaMemPoolDestroy(shared) != 0 && cudaMemPoolCreate(&plain, NULL) != 0);
    cudaGetLastError();
}

/* A pool is followed before it is its device's current one, while it is, and afterwards. */
static void access(uint32_t region) {
    void *default_pool = NULL, *own = pool_of(0, 0), *shared = pool_of(0, 1), *memory = NULL;
    CUDA(0, cudaDeviceGetDefaultMemPool(&default_pool, 0));
    CUDA(0, cudaMemPoolSetAccess(own, &given, 1));
    CUDA(0, cudaDeviceSetMemPool(0, own));
    OK(sire_region_enter(region, 0));
    CUDA(0, cudaMallocAsync(&memory, 2 * MiB, NULL));
    OK(sire_region_leave(region));
    CHECK(sire_owns(memory) && is_open_to_1(memory));
    CUDA(0, cudaDeviceSetMemPool(0, default_pool));
    CHECK(is_open_to_1(memory));
    CUDA(0, cudaMemPoolSetAccess(own, &none, 1)); /* not current any more */
    CHECK(!is_open_to_1(memory));
    /* Also what other processes may be given: in its place Sire serves where it is current. */
    CUDA(0, cudaMemPoolSetAccess(shared, &given, 1));
    CUDA(0, cudaMemPoolSetAccess(own, &given, 1));
    CUDA(0, cudaMemPoolSetAccess(shared, &none, 1));
    CHECK(is_open_to_1(memory));
    /* A pool that cannot be destroyed keeps what was given through it; one that is destroyed takes it along, paused memory included. */
    device_fault("cudaMemPoolDestroy=error:999");
    CUDA(999, cudaMemPoolDestroy(own));
    device_fault("");
    cudaGetLastError();
    CHECK(is_open_to_1(memory));
    OK(sire_pause("pools", NULL, NULL));
    CUDA(0, cudaMemPoolDestroy(own));
    OK(sire_resume("pools", NULL, NULL));
    CHECK(!is_open_to_1(memory));
    /* Whoever gets its handle next is somebody else. */
    void *next = pool_of(1, 0);
    CUDA(0, cudaMemPoolSetAccess(next, &given, 1));
    CHECK(!is_open_to_1(memory));
    CUDA(0, cudaMemPoolDestroy(next));
    CUDA(0, cudaMemPoolDestroy(shared));
    CUDA(0, cudaFreeAsync(memory, NULL));
}

int main(void) {
    *(void **)&accessible = dlsym(RTLD_DEFAULT, "sire_sim_accessible");
    CHECK(accessible != NULL);
    uint32_t region = region_of("pools", 1);
    memory(region);
    access(region);
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0 && device_used(1) == 0);
    return 0;
}
