/* The runtime comes in by an RTLD_LOCAL dlopen of a library that links it, as PyTorch's do: hooks serve it all the same.
 * argv: path of a library built from fixtures/local.c. */
#include "support.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    uint32_t region = UINT32_MAX;
    sire_region_options options = {.struct_size = sizeof options, .backup = 1};
    void *handle = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    CHECK(handle != NULL);
    CHECK(dlsym(RTLD_DEFAULT, "cudaGetDeviceCount") == NULL);
    OK(sire_region_open("local", &options, &region));
    int (*serve)(uint32_t) = (int (*)(uint32_t))dlsym(handle, "local_serve");
    CHECK(serve != NULL);
    return serve(region);
}
