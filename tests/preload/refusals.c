/* What cannot be done, and what is said of it: each refusal is read, by this program where there is a last error, by the test where there is only the log. */
#include "support.h"

/* Where nothing comes back, what went wrong is the last error. */
#define REFUSED(words, call) do { call; SAYS(words); } while (0)

static void allocator(uint32_t region) {
    const sire_torch_pool_id nobodys = {77, 78};
    char outside = 0;
    REFUSED("nothing is allocated to pool (77, 78)", sire_torch_end_allocate_to_pool(0, nobodys));
    REFUSED("there is no private pool (77, 78)", sire_torch_release_pool(0, nobodys));
    REFUSED("-5 bytes were asked for", CHECK(sire_torch_pool_malloc(-5, 0, NULL) == NULL));
    /* A C program: nobody could raise what C++ would get. */
    REFUSED("-7 bytes were asked for", CHECK(sire_torch_malloc(-7, 0, NULL) == NULL));
    REFUSED("device -1 does not exist", CHECK(sire_torch_pool_malloc(5, -1, NULL) == NULL));
    REFUSED("is not an allocation of Sire's", sire_torch_free(&outside, 0, 0, NULL));
    REFUSED("does not exist", sire_torch_set_memory_fraction(0.5, -1));
    OK(sire_region_enter(region, 0));
    char *memory = sire_torch_malloc(1000, 0, NULL);
    OK(sire_region_leave(region));
    REFUSED("it was freed before, or lies inside an allocation", sire_torch_free(memory + 512, 0, 0, NULL));
    sire_torch_free(memory, 0, 0, NULL);
    REFUSED("it was freed before, or lies inside an allocation", sire_torch_free(memory, 0, 0, NULL));
}

static void nesting(uint32_t region) {
    int depth = 0;
    while (sire_region_enter(region, 0) == SIRE_STATUS_OK) CHECK(++depth < 1000);
    SAYS("the deepest is 64");
    while (depth-- > 0) OK(sire_region_leave(region));
}

/* The program's own call is done, and Sire's part of it is not: that is said. */
static void peers(uint32_t region) {
    void *memory = allocate_in(region, 2 * MiB);
    CUDA(0, cudaSetDevice(1));
    device_fault("cudaGetDevice=error:999");
    CUDA(0, cudaDeviceEnablePeerAccess(0, 0));
    device_fault("cuMemSetAccess=error:999");
    CUDA(0, cudaDeviceDisablePeerAccess(0));
    CUDA(0, cudaDeviceEnablePeerAccess(0, 0));
    device_fault("");
    CUDA(0, cudaDeviceDisablePeerAccess(0));
    CUDA(0, cudaSetDevice(0));
    CUDA(0, cudaFree(memory));
}

/* A reservation that is to have a fence if it can, and cannot. */
static void reservation(const char *directory) {
    sire_reserve_options wish = {.struct_size = sizeof wish, .bytes = 4 * MiB, .fence = 1, .directory = directory};
    sire_reservation *held = NULL;
    device_fault("cuMemCreate=error:2");
    OK(sire_reserve(0, &wish, &held));
    device_fault("");
    OK(sire_reservation_release(held));
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    uint32_t region = region_of("r", 0);
    allocator(region);
    nesting(region);
    peers(region);
    reservation(argv[1]);
    return 0;
}
