/* CUDA_VISIBLE_DEVICES by UUID: the library names and counts devices as the program sees them.
 * argv: name (prints the last device's UUID) | only (there is one device, and regions on it work). */
#include "support.h"

static void uuid_of(int device, char *text) {
    int (*uuid)(unsigned char *, int) = (int (*)(unsigned char *, int))dlsym(RTLD_DEFAULT, "cuDeviceGetUuid_v2");
    int (*start)(unsigned) = (int (*)(unsigned))dlsym(RTLD_DEFAULT, "cuInit");
    CHECK(uuid && start);
    CUDA(0, start(0));
    unsigned char bytes[16];
    CUDA(0, uuid(bytes, device));
    text += sprintf(text, "GPU-");
    for (int i = 0; i < 16; i++) text += sprintf(text, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", bytes[i]);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int count = 0;
    char text[64];
    CUDA(0, cudaGetDeviceCount(&count));
    uuid_of(count - 1, text);
    printf("%s\n", text);
    if (!strcmp(argv[1], "name")) return count == 2 ? 0 : 1;
    CHECK(count == 1);
    char *ours = allocate_in(region_of("visible", 1), 6 * MiB);
    int32_t device = -1;
    OK(sire_allocation(ours, NULL, NULL, &device, NULL));
    CHECK(device == 0);
    fill(ours, 6 * MiB, 1);
    uint64_t used = device_used(0);
    OK(sire_pause(NULL, NULL, NULL));
    CHECK(used - device_used(0) == 6 * MiB);
    EXPECT(SIRE_STATUS_DRIVER, sire_allow_peer(0, 1));
    SAYS("the process sees 1 of them");
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(ours, 6 * MiB, 1));
    CUDA(0, cudaFree(ours));
    return 0;
}
