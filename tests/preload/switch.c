/* Two regions take turns on a device that holds one of them. */
#include "support.h"

enum { SIZE = 96 * MiB };

int main(void) {
    uint32_t a = region_of("a", 1), b = region_of("b", 1);
    char *one = allocate_in(a, SIZE);
    fill(one, SIZE, 1);
    OK(sire_pause("a", NULL, NULL));
    char *two = allocate_in(b, SIZE);
    fill(two, SIZE, 2);
    EXPECT(SIRE_STATUS_OUT_OF_DEVICE_MEMORY, sire_resume("a", NULL, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_switch("a", NULL, NULL, NULL, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_switch(NULL, "a", NULL, NULL, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_switch("b", "b", NULL, NULL, NULL));
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_switch("b", "c", NULL, NULL, NULL));
    sire_report left = {.struct_size = sizeof left}, came = {.struct_size = sizeof came};
    for (int turn = 0; turn < 3; turn++) {
        OK(sire_switch("b", "a", NULL, &left, &came));
        CHECK(left.bytes_copied == SIZE && came.bytes_copied == SIZE && device_used(0) == SIZE);
        CHECK(holds(one, SIZE, 1));
        OK(sire_switch("a", "b", NULL, NULL, NULL));
        CHECK(holds(two, SIZE, 2));
    }
    OK(sire_switch("a", "b", NULL, &left, &came));
    CHECK(left.regions_changed == 0 && came.regions_changed == 0);
    return 0;
}
