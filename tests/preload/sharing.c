/* What large allocations are made of: physical memory with the properties that PyTorch's users need, before and after a pause.
 * argv: exportable | private. */
#include "support.h"
#include <unistd.h>

typedef struct {
    int kind, handle_types;
    struct { int kind, id; } location;
    void *win32;
    struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} properties;

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int exportable = !strcmp(argv[1], "exportable");
    int (*retain)(uint64_t *, void *) = (int (*)(uint64_t *, void *))dlsym(RTLD_DEFAULT, "cuMemRetainAllocationHandle");
    int (*release)(uint64_t) = (int (*)(uint64_t))dlsym(RTLD_DEFAULT, "cuMemRelease");
    int (*of)(properties *, uint64_t) = (int (*)(properties *, uint64_t))dlsym(RTLD_DEFAULT, "cuMemGetAllocationPropertiesFromHandle");
    int (*export)(int *, uint64_t, int, unsigned long long) =
        (int (*)(int *, uint64_t, int, unsigned long long))dlsym(RTLD_DEFAULT, "cuMemExportToShareableHandle");
    CHECK(retain && release && of && export);
    void *ours = allocate_in(region_of("shared", 1), 4 * MiB);
    for (int cycle = 0; cycle < 2; cycle++) {
        uint64_t handle = 0;
        properties found;
        int file = -1;
        CUDA(0, retain(&handle, ours));
        CUDA(0, of(&found, handle));
        CHECK(found.flags.rdma == 1 && found.handle_types == exportable);
        CHECK((export(&file, handle, 1, 0) == 0) == exportable);
        if (exportable) close(file);
        CUDA(0, release(handle));
        OK(sire_pause("shared", NULL, NULL));
        OK(sire_resume("shared", NULL, NULL));
    }
    CUDA(0, cudaFree(ours));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
