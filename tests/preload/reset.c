/* cudaDeviceReset ends every allocation, stream and event of the device in this process, and the program may use it again. Sire once did not hear of it: its memory
 * stayed on the device, and the next pause used streams that were gone. argv:
 *   again     in the middle, with memory that is resident, paused, held lazily and freed before, then from the beginning
 *   last      the program's last call        paused    the same while a region is paused
 *   lost      to be rid of an error that would stay for ever
 *   captured  while streams are being captured: one of this device's ends with it, what was told of otherwise goes on
 *   other     of two devices the one that host memory was registered through; what is paused on the other comes back
 *   mapped    what the program mapped itself is its own to unmap
 *   early, late    at exit, by a handler from before Sire's start or after, while a region is paused */
#include "support.h"
#include "virtual.h"
#include <unistd.h>

enum { LARGE = 20 * MiB, SMALL = 4 * KiB };
typedef struct { void *large, *small; } Pair;

static Pair allocate(uint32_t region, unsigned seed) {
    Pair pair = {allocate_in(region, LARGE), allocate_in(region, SMALL)};
    fill(pair.large, LARGE, seed);
    fill(pair.small, SMALL, seed + 1);
    return pair;
}

static int is_there(Pair pair, unsigned seed) { return holds(pair.large, LARGE, seed) && holds(pair.small, SMALL, seed + 1); }

/* Regions work from the beginning, and hold what was allocated since. */
static void works(uint32_t region, const char *tag, unsigned seed) {
    Pair pair = allocate(region, seed);
    for (int round = 0; round < 2; round++) {
        uint64_t used = device_used(0);
        OK(sire_pause(tag, NULL, NULL));
        CHECK(used - device_used(0) >= LARGE);
        OK(sire_resume(tag, NULL, NULL));
        CHECK(is_there(pair, seed));
    }
}

/* Nothing of what was allocated before is left, on the device or in a backup; free takes none of it. */
static void is_gone(Pair pair) {
    CHECK(!sire_owns(pair.large) && !sire_owns(pair.small) && cudaFree(pair.large) != 0);
    CHECK(device_used(0) == 0 && statistic("\"tier\":\"host\"", "used_bytes") == 0);
}

static uint32_t verified(const char *tag) {
    sire_region_options options = {.struct_size = sizeof options, .backup = 1, .clean = 2};
    uint32_t region = UINT32_MAX;
    OK(sire_region_open(tag, &options, &region));
    return region;
}

static void again(uint32_t model) {
    uint32_t away = region_of("away", 1), lazy = region_of("lazy", 1), checked = verified("checked");
    for (unsigned round = 0; round < 3; round++) {
        void *outside = NULL;
        CUDA(0, cudaMalloc(&outside, 5 * MiB));
        works(model, "model", 10 * round);
        works(checked, "checked", 10 * round + 2);
        Pair pair = allocate(away, 10 * round + 4);
        CUDA(0, cudaFree(allocate_in(model, SMALL)));
        allocate(lazy, 10 * round + 6);
        OK(sire_pause("away", NULL, NULL));
        sire_pause_options lazily = {.struct_size = sizeof lazily, .release = 1};
        OK(sire_pause("lazy", &lazily, NULL));
        CUDA(0, cudaDeviceReset());
        is_gone(pair);
        /* Regions stay as they were declared, and in their state. */
        int32_t state = -1;
        OK(sire_region_state(away, &state));
        CHECK(state == 1);
        OK(sire_resume(NULL, NULL, NULL));
        OK(sire_pause(NULL, NULL, NULL));
        OK(sire_resume(NULL, NULL, NULL));
        CHECK(device_used(0) == 0);
    }
    works(model, "model", 40);
}

static void lost(uint32_t model) {
    Pair pair = allocate(model, 1);
    char *thrown = allocate_in(region_of("thrown", 0), LARGE);
    OK(sire_pause("thrown", NULL, NULL));
    cudaError stray = cudaMemset(thrown, 1, LARGE);
    if (stray == 0) stray = cudaDeviceSynchronize();
    CHECK(stray == 700 && cudaDeviceSynchronize() == 700);
    EXPECT(SIRE_STATUS_DEVICE_LOST, sire_pause("model", NULL, NULL));
    CUDA(0, cudaDeviceReset());
    is_gone(pair);
    works(model, "model", 3);
}

static void captured(uint32_t model) {
    Pair pair = allocate(model, 1);
    void *stream = NULL;
    CUDA(0, cudaStreamCreate(&stream));
    CUDA(0, cudaStreamBeginCapture(stream, 2));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("model", NULL, NULL));
    CUDA(0, cudaDeviceReset());
    is_gone(pair);
    works(model, "model", 3);
    /* One that Sire was told of may be another device's: nothing waits for it, and what is left goes when it is over. */
    OK(sire_capture_begin());
    CUDA(0, cudaDeviceReset());
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("model", NULL, NULL));
    OK(sire_capture_end());
    works(model, "model", 5);
    CUDA(0, cudaDeviceReset());
    is_gone(pair);
}

static void other(uint32_t model) {
    uint32_t second = region_of("second", 1);
    works(model, "model", 1);
    CUDA(0, cudaSetDevice(1));
    Pair pair = allocate(second, 3);
    CUDA(0, cudaDeviceEnablePeerAccess(0, 0));
    OK(sire_pause("second", NULL, NULL));
    CUDA(0, cudaSetDevice(0));
    CHECK(statistic("\"tiers\"", "registered_bytes") > 0);
    CUDA(0, cudaDeviceReset());
    CHECK(device_used(0) == 0 && statistic("\"tiers\"", "registered_bytes") == 0);
    OK(sire_resume("second", NULL, NULL));
    CHECK(statistic("\"tiers\"", "registered_bytes") > 0);
    CUDA(0, cudaSetDevice(1));
    CHECK(is_there(pair, 3));
    OK(sire_pause("second", NULL, NULL));
    OK(sire_resume("second", NULL, NULL));
    CHECK(is_there(pair, 3) && device_used(1) >= LARGE);
    CUDA(0, cudaDeviceEnablePeerAccess(0, 0)); /* it had ended */
    CUDA(0, cudaSetDevice(0));
    works(model, "model", 5);
}

static void *driver(const char *name) {
    void *found = NULL;
    CUDA(0, cudaGetDriverEntryPointByVersion(name, &found, 12000, 0, NULL));
    return found;
}

static void mapped(uint32_t model) {
    unsigned long long address = 0, handle = 0;
    const properties wanted = {.kind = 1, .where = {1, 0}};
    const permission access = {{1, 0}, 3};
    allocate(model, 1);
    CUDA(0, ((int (*)(unsigned long long *, size_t, size_t, unsigned long long, unsigned long long))driver("cuMemAddressReserve"))(&address, LARGE, 0, 0, 0));
    OK(sire_region_enter(model, 0));
    CUDA(0, ((int (*)(unsigned long long *, size_t, const properties *, unsigned long long))driver("cuMemCreate"))(&handle, LARGE, &wanted, 0));
    CUDA(0, ((int (*)(unsigned long long, size_t, size_t, unsigned long long, unsigned long long))driver("cuMemMap"))(address, LARGE, 0, handle, 0));
    CUDA(0, ((int (*)(unsigned long long, size_t, const permission *, size_t))driver("cuMemSetAccess"))(address, LARGE, &access, 1));
    OK(sire_region_leave(model));
    void *ours = (void *)(uintptr_t)address;
    fill(ours, LARGE, 3);
    OK(sire_pause("model", NULL, NULL));
    CUDA(0, cudaDeviceReset());
    CHECK(device_used(0) == 0);
    OK(sire_resume("model", NULL, NULL));
    CHECK(holds(ours, LARGE, 3));
    CUDA(0, cudaDeviceReset());
    CHECK(device_used(0) == LARGE && holds(ours, LARGE, 3));
    works(model, "model", 5);
    CHECK(holds(ours, LARGE, 3));
    CUDA(0, ((int (*)(unsigned long long, size_t))driver("cuMemUnmap"))(address, LARGE));
    CUDA(0, ((int (*)(unsigned long long))driver("cuMemRelease"))(handle));
    CUDA(0, cudaDeviceReset());
    CHECK(device_used(0) == 0);
}

/* 4: the runtime has gone already. */
static void at_exit(void) {
    cudaError code = cudaDeviceReset();
    if (code != 0 && code != 4) _exit(9);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    alarm(60);
    const char *how = argv[1];
    if (!strcmp(how, "early")) CHECK(atexit(at_exit) == 0);
    CUDA(0, cudaDeviceReset()); /* before there is anything */
    uint32_t model = region_of("model", 1);
    if (!strcmp(how, "again")) again(model);
    if (!strcmp(how, "lost")) lost(model);
    if (!strcmp(how, "captured")) captured(model);
    if (!strcmp(how, "other")) other(model);
    if (!strcmp(how, "mapped")) mapped(model);
    if (!strcmp(how, "early") || !strcmp(how, "late")) {
        works(model, "model", 1);
        OK(sire_pause("model", NULL, NULL));
        if (!strcmp(how, "late")) CHECK(atexit(at_exit) == 0);
    }
    if (!strcmp(how, "last") || !strcmp(how, "paused")) {
        works(model, "model", 1);
        if (!strcmp(how, "paused")) OK(sire_pause("model", NULL, NULL));
        CUDA(0, cudaDeviceReset());
        CHECK(device_used(0) == 0);
    }
    return 0;
}
