/* Memory that somebody else has a handle of: a pause leaves it, says so, and counts it; what cannot be handed out is refused by name. */
#include "support.h"
#include "virtual.h"

static int (*reserve)(uint64_t *, size_t, size_t, uint64_t, unsigned long long), (*create)(uint64_t *, size_t, const properties *, unsigned long long);
static int (*map)(uint64_t, size_t, size_t, uint64_t, unsigned long long), (*set_access)(uint64_t, size_t, const permission *, size_t);
static int (*retain)(uint64_t *, void *), (*release)(uint64_t), (*export)(void *, uint64_t, int, unsigned long long);
static int (*range_handle)(void *, uint64_t, size_t, int, unsigned long long);
static int (*bind)(uint64_t, size_t, uint64_t, size_t, size_t, unsigned long long), (*bind_address)(uint64_t, size_t, uint64_t, size_t, unsigned long long);
static int (*bind_13)(uint64_t, int, size_t, uint64_t, size_t, size_t, unsigned long long), (*bind_address_13)(uint64_t, int, size_t, uint64_t, size_t, unsigned long long);

static void find_functions(void) {
    struct { const char *name; void *place; unsigned version; } wanted[] = {{"cuMemAddressReserve", &reserve, 12000}, {"cuMemCreate", &create, 12000}, {"cuMemMap", &map, 12000},
        {"cuMemSetAccess", &set_access, 12000}, {"cuMemRetainAllocationHandle", &retain, 12000}, {"cuMemRelease", &release, 12000}, {"cuMemExportToShareableHandle", &export, 12000},
        {"cuMemGetHandleForAddressRange", &range_handle, 12000}, {"cuMulticastBindMem", &bind, 12010}, {"cuMulticastBindAddr", &bind_address, 13000},
        {"cuMulticastBindMem", &bind_13, 13010}, {"cuMulticastBindAddr", &bind_address_13, 13020}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        CUDA(0, cudaGetDriverEntryPointByVersion(wanted[i].name, wanted[i].place, wanted[i].version, 0, NULL));
        CHECK(*(void **)wanted[i].place != NULL);
    }
}

/* Memory that the program maps itself; at 0 it is mapped nowhere. */
static uint64_t make(uint32_t region, uint64_t at) {
    const properties asked = {.kind = 1, .handle_types = 1, .where = {1, 0}};
    const permission own = {{1, 0}, 3};
    uint64_t handle = 0;
    OK(sire_region_enter(region, 0));
    CUDA(0, create(&handle, 4 * MiB, &asked, 0));
    OK(sire_region_leave(region));
    if (at) CUDA(0, map(at, 4 * MiB, 0, handle, 0));
    if (at) CUDA(0, set_access(at, 4 * MiB, &own, 1));
    return handle;
}

/* What the statistics say, before any pause, that no pause of the region will take. A region's "held" comes before its "tag". */
static uint64_t held_because(const char *tag, const char *why) {
    size_t length = 0;
    OK(sire_stats_json(NULL, 0, &length));
    char *text = malloc(length + 1), key[64];
    OK(sire_stats_json(text, length + 1, &length));
    snprintf(key, sizeof key, "\"tag\":\"%s\"", tag);
    char *end = strstr(text, key);
    CHECK(end != NULL);
    *end = 0;
    char *held = NULL;
    for (char *at = text; (at = strstr(at, "\"held\":{")) != NULL; at++) held = at;
    CHECK(held != NULL);
    snprintf(key, sizeof key, "\"%s\":", why);
    char *found = strstr(held, key);
    uint64_t bytes = found ? strtoull(found + strlen(key), NULL, 10) : 0;
    free(text);
    return bytes;
}

static void pauses(const char *tag, uint64_t moved, uint64_t held) {
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause(tag, NULL, &report));
    CHECK(report.bytes_held == held && report.bytes_moved == moved);
    OK(sire_resume(tag, NULL, NULL));
}

/* Bound to a multicast object, as NVLink's reductions want it: it stays, and that is said. The software device has no such objects, and says so to
 * who tries; that one was bound is the fault plan's word. In both forms: since CUDA 13.1 the device is an argument. */
static int bind_handle(int form, uint64_t handle) { return form ? bind_13(1, 0, 0, handle, 0, 4 * MiB, 0) : bind(1, 0, handle, 0, 4 * MiB, 0); }
static int bind_range(int form, char *at) { return form ? bind_address_13(1, 0, 0, (uint64_t)at, 2 * MiB, 0) : bind_address(1, 0, (uint64_t)at, 2 * MiB, 0); }

static void multicast(int form) {
    const char *tag = form ? "reductions 13" : "reductions 12";
    uint32_t region = region_of(tag, 1);
    uint64_t base = 0;
    CUDA(0, reserve(&base, 4 * MiB, 0, 0, 0));
    uint64_t handle = make(region, base);
    char *bound = allocate_in(region, 2 * MiB), *paused = allocate_in(region, 6 * MiB);
    /* 801: the driver was given its own handle, and memory that it knows. */
    CUDA(801, bind_handle(form, handle));
    CUDA(801, bind_range(form, bound));
    CUDA(1, bind_handle(form, 0x51AE00000000FFFFull));
    SAYS("is no live handle of physical memory");
    CHECK(held_because(tag, "it is bound to a multicast object") == 0);
    pauses(tag, 12 * MiB, 0);
    device_fault("cuMulticastBindMem=error:0; cuMulticastBindMem_v2=error:0; cuMulticastBindAddr=error:0; cuMulticastBindAddr_v2=error:0");
    CUDA(0, bind_handle(form, handle));
    CUDA(0, bind_range(form, bound));
    CHECK(held_because(tag, "it is bound to a multicast object") == 6 * MiB);
    pauses(tag, 6 * MiB, 6 * MiB);
    OK(sire_pause(tag, NULL, NULL));
    CUDA(800, bind_range(form, paused)); /* what is away cannot be bound */
    SAYS("the memory at ");
    SAYS("is paused; resume its region first");
    OK(sire_resume(tag, NULL, NULL));
    device_fault("");
    CUDA(0, cudaFree(bound));
    CUDA(0, cudaFree(paused));
}

/* Libraries try which handles there are, and go on with the next kind: what was refused holds nothing. */
static void tried(void) {
    enum { FABRIC = 8, DESCRIPTOR = 1 };
    uint32_t region = region_of("tried", 1);
    uint64_t base = 0;
    char token[64];
    int descriptor = -1;
    CUDA(0, reserve(&base, 8 * MiB, 0, 0, 0));
    uint64_t mapped = make(region, base), loose = make(region, 0);
    CUDA(1, export(token, mapped, FABRIC, 0));
    CUDA(1, export(token, loose, FABRIC, 0));
    CUDA(0, map(base + 4 * MiB, 4 * MiB, 0, loose, 0));
    const permission own = {{1, 0}, 3}, odd = {{1, 0}, 2};
    CUDA(0, set_access(base + 4 * MiB, 4 * MiB, &own, 1));
    CHECK(set_access(base, 4 * MiB, &odd, 1) != 0);
    CHECK(map(base, 4 * MiB, 0, mapped, 1) != 0); /* there are no flags */
    char *linear = allocate_in(region, 2 * MiB);
    CUDA(1, retain(NULL, linear));
    CUDA(801, range_handle(&descriptor, (uint64_t)linear, 2 * MiB, 1, 0));
    fill((void *)(uintptr_t)base, 8 * MiB, 4);
    pauses("tried", 10 * MiB, 0);
    CHECK(holds((void *)(uintptr_t)base, 8 * MiB, 4));
    /* What works holds what it is about, and no more. */
    CUDA(0, export(&descriptor, mapped, DESCRIPTOR, 0));
    CHECK(descriptor >= 0);
    CHECK(held_because("tried", "it was exported to other processes") == 4 * MiB);
    pauses("tried", 6 * MiB, 4 * MiB);
    device_fault("cuMemGetHandleForAddressRange=error:0");
    CUDA(0, range_handle(&descriptor, (uint64_t)linear, 2 * MiB, 1, 0));
    device_fault("");
    CHECK(held_because("tried", "a dma-buf handle of it was made") == 2 * MiB);
    pauses("tried", 4 * MiB, 6 * MiB);
    CUDA(0, cudaFree(linear));
}

int main(void) {
    find_functions();
    multicast(0);
    multicast(1);
    tried();
    uint32_t region = region_of("buffers", 1);
    char *shared = allocate_in(region, 4 * MiB), *own = allocate_in(region, 6 * MiB), *small = allocate_in(region, 4 * KiB);
    fill(shared, 4 * MiB, 1);
    fill(own, 6 * MiB, 2);
    fill(small, 4 * KiB, 3);
    uint64_t used = device_used(0), handle = 0;

    CUDA(0, retain(&handle, shared + MiB));
    CHECK(held_because("buffers", "a handle of it was retained") == 4 * MiB);
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause("buffers", NULL, &report));
    CHECK(report.bytes_held == 4 * MiB && report.bytes_moved == 8 * MiB && used - device_used(0) == 8 * MiB);
    CHECK(holds(shared, 4 * MiB, 1));
    OK(sire_require_usable(shared));
    EXPECT(SIRE_STATUS_PAUSED, sire_require_usable(own));
    SAYS("region 'buffers', which is paused; resume it first");
    uint64_t other = 0;
    CUDA(800, retain(&other, own));
    CHECK(other == 0);
    OK(sire_resume("buffers", NULL, NULL));
    OK(sire_require_usable(own));
    CHECK(holds(own, 6 * MiB, 2) && holds(small, 4 * KiB, 3));
    CUDA(0, release(handle));

    char ipc[64] = {0};
    CUDA(801, cudaIpcGetMemHandle(ipc, own));
    SAYS("is in region 'buffers', and cudaIpcGetMemHandle cannot hand such memory to another process");
    for (size_t i = 0; i < sizeof ipc; i++) CHECK(ipc[i] == 0);
    void *plain = NULL;
    CUDA(0, cudaMalloc(&plain, 2 * MiB));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_require_usable(plain));
    CUDA(0, cudaIpcGetMemHandle(ipc, plain)); /* outside regions it is the runtime's */
    CHECK(cudaGetLastError() == 0);

    CUDA(0, cudaFree(plain));
    CUDA(0, cudaFree(shared));
    CUDA(0, cudaFree(own));
    CUDA(0, cudaFree(small));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 16 * MiB); /* what the program mapped itself */
    return 0;
}
