/* A library of NVIDIA's own, with its own runtime inside: it looks the driver's functions up past everybody, and finds Sire's. argv: cublas | nccl, and the
 * library's path. Prints how far it starts: look-ups that were answered with functions of Sire's, its version, the status of its first call on the device. */
#define _GNU_SOURCE
#include "driver.h"

typedef struct { char bytes[128]; } UniqueId;

static void *function(void *library, const char *name) {
    void *found = dlsym(library, name);
    CHECK(found != NULL);
    return found;
}

static int cublas(void *library, int *version) {
    void *handle = NULL;
    int code = ((int (*)(void **))function(library, "cublasCreate_v2"))(&handle);
    CUDA(0, ((int (*)(void *, int *))function(library, "cublasGetVersion_v2"))(handle, version));
    return code;
}

static int nccl(void *library, int *version) {
    UniqueId id = {{0}};
    void *communicator = NULL;
    CUDA(0, ((int (*)(int *))function(library, "ncclGetVersion"))(version));
    CUDA(0, ((int (*)(UniqueId *))function(library, "ncclGetUniqueId"))(&id));
    return ((int (*)(void **, int, UniqueId, int))function(library, "ncclCommInitRank"))(&communicator, 1, id, 0);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    watchdog();
    int live = 0, version = 0;
    uint32_t region = region_of("library", 1);
    void *own = allocate_in(region, 4 * MiB);
    fill(own, 4 * MiB, 1);
    OK(sire_driver_hook_probe(&live));
    CHECK(live == 1);
    long answered = statistic("driver_hooks", "answered");
    OK(sire_region_enter(region, 0));
    void *library = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    int code = !strcmp(argv[1], "cublas") ? cublas(library, &version) : nccl(library, &version);
    OK(sire_region_leave(region));
    printf("%ld %d %d\n", statistic("driver_hooks", "answered") - answered, version, code);
    /* Whatever became of it, the program's own memory goes and comes back. */
    OK(sire_pause("library", NULL, NULL));
    CHECK(device_used(0) == 0);
    OK(sire_resume("library", NULL, NULL));
    CHECK(holds(own, 4 * MiB, 1));
    return 0;
}
