/* Dies by the fault plan in the middle of a pause; argv: "hold" dies, "after" sees that the device has its memory again. */
#include "support.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    if (!strcmp(argv[1], "after")) {
        CHECK(device_used(0) == 0);
        return 0;
    }
    void *ours = allocate_in(region_of("doomed", atoi(argv[1])), 150 * MiB);
    fill(ours, 150 * MiB, 1);
    device_fault("cuMemUnmap#2=kill");
    sire_pause(NULL, NULL, NULL);
    fprintf(stderr, "survived\n");
    return 0;
}
