/* PyTorch's expandable segments, call by call: what it asks the driver for through the runtime, in its order, with its
 * arguments; and what a pause in between must not change. argv: regions | process | off | odd. */
#define _GNU_SOURCE
#include "support.h"
#include "virtual.h"
#include <unistd.h>

typedef unsigned long long Addr;
typedef unsigned long long Handle;

static int (*Reserve)(Addr *, size_t, size_t, Addr, unsigned long long);
static int (*AddressFree)(Addr, size_t);
static int (*Create)(Handle *, size_t, const properties *, unsigned long long);
static int (*Release)(Handle);
static int (*Map)(Addr, size_t, size_t, Handle, unsigned long long);
static int (*Unmap)(Addr, size_t);
static int (*SetAccess)(Addr, size_t, const permission *, size_t);
static int (*Retain)(Handle *, void *);
static int (*Properties)(properties *, Handle);
static int (*Export)(void *, Handle, int, unsigned long long);
static int (*Import)(Handle *, void *, int);
static int (*AddressRange)(Addr *, size_t *, Addr);

/* As c10::cuda::DriverAPI does: by version, through the runtime. */
static void *look_up(const char *name, unsigned version) {
    void *found = NULL;
    int status = -1;
    CUDA(0, cudaGetDriverEntryPointByVersion(name, &found, version, 0, &status));
    CHECK(found != NULL && status == 0);
    return found;
}

static int is_ours(void *function) {
    Dl_info where;
    CHECK(dladdr(function, &where));
    return strstr(where.dli_fname, "libsire_alloc") != NULL;
}

static void look_all_up(int ours) {
#define GET(variable, name)                                                                                            \
    do {                                                                                                               \
        void *found_ = look_up(name, 12000), *again_ = NULL;                                                           \
        CHECK(is_ours(found_) == ours);                                                                                \
        CUDA(0, cudaGetDriverEntryPoint(name, &again_, 0, NULL));                                                      \
        CHECK(again_ == found_);                                                                                       \
        *(void **)&variable = found_;                                                                                  \
    } while (0)
    GET(Reserve, "cuMemAddressReserve");
    GET(AddressFree, "cuMemAddressFree");
    GET(Create, "cuMemCreate");
    GET(Release, "cuMemRelease");
    GET(Map, "cuMemMap");
    GET(Unmap, "cuMemUnmap");
    GET(SetAccess, "cuMemSetAccess");
    GET(Retain, "cuMemRetainAllocationHandle");
    GET(Properties, "cuMemGetAllocationPropertiesFromHandle");
    GET(Export, "cuMemExportToShareableHandle");
    GET(AddressRange, "cuMemGetAddressRange");
#undef GET
    *(void **)&Import = look_up("cuMemImportFromShareableHandle", 12000);
    /* What is not in the table is the driver's. */
    CHECK(!is_ours((void *)Import) && !is_ours(look_up("cuMemGetAllocationGranularity", 12000)));
    CHECK(!is_ours(look_up("cuMemAlloc", 12000)) && !is_ours(look_up("cuCtxGetCurrent", 12000)));
    void *unknown = (void *)1;
    CHECK(cudaGetDriverEntryPointByVersion("cuNoSuchThing", &unknown, 12000, 0, NULL) != 0 || unknown == NULL);
}

enum { CHUNK = 2 * MiB, SLOTS = 8 };
static const properties torch_asks = {.kind = 1, .handle_types = 1, .where = {1, 0}, .flags = {.rdma = 1}};
static const permission read_and_write = {{1, 0}, 3};

typedef struct { Addr base; Handle handles[SLOTS]; } segment;

static segment reserved(void) {
    segment made = {0};
    CUDA(0, Reserve(&made.base, (size_t)SLOTS * CHUNK, 0, 0, 0));
    return made;
}

static void *at(const segment *s, int slot) { return (void *)(uintptr_t)(s->base + (Addr)slot * CHUNK); }

/* All creates, all maps, one SetAccess. On a shortage what was made is released, and nothing has changed. */
static int grow(segment *s, int from, int to) {
    for (int i = from; i < to; i++) {
        int code = Create(&s->handles[i], CHUNK, &torch_asks, 0);
        if (code) {
            for (int j = from; j < i; j++) CUDA(0, Release(s->handles[j]));
            return code;
        }
    }
    for (int i = from; i < to; i++) CUDA(0, Map(s->base + (Addr)i * CHUNK, CHUNK, 0, s->handles[i], 0));
    CUDA(0, SetAccess(s->base + (Addr)from * CHUNK, (size_t)(to - from) * CHUNK, &read_and_write, 1));
    return 0;
}

static void shrink(segment *s, int from, int to) {
    for (int i = from; i < to; i++) {
        CUDA(0, Unmap(s->base + (Addr)i * CHUNK, CHUNK));
        CUDA(0, Release(s->handles[i]));
        s->handles[i] = 0;
    }
}

static void dropped(segment *s) { CUDA(0, AddressFree(s->base, (size_t)SLOTS * CHUNK)); }

static void regions(void) {
    uint32_t a = region_of("a", 1), b = region_of("b", 0);
    OK(sire_region_enter(a, 0));
    segment s = reserved();
    CUDA(0, grow(&s, 0, 2));
    OK(sire_region_leave(a));
    OK(sire_region_enter(b, 0));
    segment t = reserved();
    CUDA(0, grow(&t, 0, 1));
    OK(sire_region_leave(b));
    fill(at(&s, 0), 2 * CHUNK, 1);
    fill(at(&t, 0), CHUNK, 2);
    CHECK(device_used(0) == 3ull * CHUNK && sire_owns(at(&s, 1)) && !sire_owns(at(&s, 2)));

    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause("a", NULL, &report));
    CHECK(report.bytes_moved == 2ull * CHUNK && report.bytes_copied == 2ull * CHUNK && device_used(0) == CHUNK);
    CHECK(holds(at(&t, 0), CHUNK, 2));
    /* What PyTorch asks about its memory has the same answers; exporting it is refused, and changes nothing. */
    properties found;
    memset(&found, 0xff, sizeof found);
    CUDA(0, Properties(&found, s.handles[0]));
    CHECK(memcmp(&found, &torch_asks, sizeof found) == 0);
    Handle again = 0;
    CUDA(0, Retain(&again, (char *)at(&s, 1) + 5));
    CHECK(again == s.handles[1]);
    CUDA(0, Release(again));
    Addr base = 0;
    size_t size = 0;
    CUDA(0, AddressRange(&base, &size, s.base + CHUNK + 7));
    CHECK(base == s.base + CHUNK && size == CHUNK);
    CUDA(0, AddressRange(NULL, NULL, s.base));
    int file = -1;
    CUDA(800, Export(&file, s.handles[0], 1, 0));
    /* empty_cache while paused. */
    shrink(&s, 1, 2);
    OK(sire_resume("a", NULL, &report));
    CHECK(report.bytes_moved == CHUNK && holds(at(&s, 0), CHUNK, 1) && device_used(0) == 2ull * CHUNK);
    /* Growth into the hole; several at once unmapped by one call. */
    OK(sire_region_enter(a, 0));
    CUDA(0, grow(&s, 1, 4));
    OK(sire_region_leave(a));
    fill(at(&s, 1), 3 * CHUNK, 3);
    OK(sire_pause(NULL, NULL, NULL));
    CHECK(device_used(0) == 0);
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(at(&s, 0), CHUNK, 1) && holds(at(&s, 1), 3 * CHUNK, 3));
    CUDA(0, Unmap(s.base + CHUNK, 3 * CHUNK));
    for (int i = 1; i < 4; i++) CUDA(0, Release(s.handles[i]));
    /* Released right after it was mapped, it lives until it is unmapped. */
    CUDA(0, Release(s.handles[0]));
    CUDA(1, Release(s.handles[0]));
    CHECK(holds(at(&s, 0), CHUNK, 1));
    OK(sire_pause("a", NULL, NULL));
    OK(sire_resume("a", NULL, NULL));
    CHECK(holds(at(&s, 0), CHUNK, 1));
    CUDA(0, Unmap(s.base, CHUNK));
    shrink(&t, 0, 1);
    dropped(&s);
    dropped(&t);
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    /* Handles that are no more never reach the driver. */
    CUDA(1, Map(s.base, CHUNK, 0, s.handles[0], 0));
    CUDA(1, Properties(&found, s.handles[0]));
    CUDA(1, Export(&file, s.handles[0], 1, 0));
}

/* Everything of a program that knows nothing of Sire, on a device that is too small. */
static void process_wide(void) {
    segment s = reserved();
    CUDA(0, grow(&s, 0, 3));
    fill(at(&s, 0), 3 * CHUNK, 4);
    /* The device has room for five. */
    CHECK(grow(&s, 3, 7) == 2);
    CUDA(0, grow(&s, 3, 5));
    fill(at(&s, 3), 2 * CHUNK, 5);
    OK(sire_pause(NULL, NULL, NULL));
    CHECK(device_used(0) == 0);
    /* While it is paused nothing can be made in it: the one failure that PyTorch knows. */
    CHECK(grow(&s, 5, 6) == 2);
    SAYS("paused");
    /* But not of fabric handles, of which there has never been one: PyTorch would take that for a yes, and ask for no other kind any more. */
    properties fabric = torch_asks;
    fabric.handle_types = 8;
    Handle none;
    CUDA(801, Create(&none, CHUNK, &fabric, 0));
    /* Somebody else takes what is free; the resume fails, all stays paused, and can be repeated. */
    OK(sire_region_suspend());
    void *thief = NULL;
    CUDA(0, cudaMalloc(&thief, 2 * CHUNK));
    EXPECT(SIRE_STATUS_OUT_OF_DEVICE_MEMORY, sire_resume(NULL, NULL, NULL));
    CUDA(0, cudaFree(thief));
    OK(sire_region_unsuspend());
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(at(&s, 0), 3 * CHUNK, 4) && holds(at(&s, 3), 2 * CHUNK, 5));
    /* Driver calls of the resume fail: rolled back, repeated. */
    OK(sire_pause(NULL, NULL, NULL));
    const char *plans[] = {"cuMemCreate=error:2", "cuMemMap=error:999", "cuMemSetAccess=error:999"};
    for (int i = 0; i < 3; i++) {
        device_fault(plans[i]);
        CHECK(sire_resume(NULL, NULL, NULL) != SIRE_STATUS_OK);
        device_fault("");
        CHECK(device_used(0) == 0);
    }
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(at(&s, 0), 3 * CHUNK, 4) && holds(at(&s, 3), 2 * CHUNK, 5));
    OK(sire_pause(NULL, NULL, NULL));
    shrink(&s, 0, 5);
    dropped(&s);
    OK(sire_resume(NULL, NULL, NULL));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
}

/* Outside regions, and with Sire switched off, all is the driver's. */
static void outside(void) {
    segment s = reserved();
    CUDA(0, grow(&s, 0, 2));
    CHECK(s.handles[0] >> 48 != 0x51AE && !sire_owns(at(&s, 0)));
    fill(at(&s, 0), 2 * CHUNK, 6);
    CHECK(holds(at(&s, 0), 2 * CHUNK, 6));
    Handle again = 0;
    CUDA(0, Retain(&again, at(&s, 0)));
    CHECK(again >> 48 != 0x51AE);
    CUDA(0, Release(again));
    properties found;
    CUDA(0, Properties(&found, s.handles[0]));
    CHECK(found.handle_types == 1 && found.flags.rdma == 1);
    shrink(&s, 0, 2);
    dropped(&s);
    CHECK(device_used(0) == 0);
}

/* The program has unmapped, and the driver has refused: nothing else can be mapped there until it does. */
static void refused(void) {
    uint32_t region = region_of("refused", 1);
    OK(sire_region_enter(region, 0));
    segment s = reserved();
    CUDA(0, grow(&s, 0, 2));
    CHECK(Unmap(s.base, (size_t)1 << 60) == 1);
    SAYS("end beyond the last address there is");
    /* A second mapping that the driver refuses: the memory has one, as before, and is not held. */
    device_fault("cuMemMap=error:999");
    CUDA(999, Map(s.base + 4 * CHUNK, CHUNK, 0, s.handles[0], 0));
    device_fault("");
    OK(sire_region_leave(region));
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause("refused", NULL, &report));
    CHECK(report.bytes_held == 0 && device_used(0) == 0);
    OK(sire_resume("refused", NULL, NULL));
    OK(sire_region_enter(region, 0));
    device_fault("cuMemUnmap=error:999");
    CUDA(0, Unmap(s.base, CHUNK));
    CHECK(Map(s.base, CHUNK, 0, s.handles[0], 0) != 0);
    SAYS("were unmapped, but the driver still refuses to");
    device_fault("");
    CUDA(0, Map(s.base, CHUNK, 0, s.handles[0], 0));
    CUDA(0, SetAccess(s.base, CHUNK, &read_and_write, 1));
    OK(sire_region_leave(region));
    fill(at(&s, 0), 2 * CHUNK, 8);
    OK(sire_pause("refused", NULL, NULL));
    CHECK(device_used(0) == 0);
    OK(sire_resume("refused", NULL, NULL));
    CHECK(holds(at(&s, 0), 2 * CHUNK, 8));
    shrink(&s, 0, 2);
    dropped(&s);
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
}

/* What PyTorch's allocator does not do, but others may. */
static void odd(void) {
    uint32_t a = region_of("a", 1);
    OK(sire_region_enter(a, 0));
    segment s = reserved();
    CUDA(0, grow(&s, 0, 3));
    OK(sire_region_leave(a));
    fill(at(&s, 0), 3 * CHUNK, 7);
    /* Exported memory stays, and can be imported and seen by its new owner; the rest is paused. */
    int file = -1;
    CUDA(0, Export(&file, s.handles[0], 1, 0));
    Handle imported = 0;
    CUDA(0, Import(&imported, (void *)(intptr_t)file, 1));
    close(file);
    CHECK(imported >> 48 != 0x51AE);
    segment peer = reserved();
    CUDA(0, Map(peer.base, CHUNK, 0, imported, 0));
    CUDA(0, SetAccess(peer.base, CHUNK, &read_and_write, 1));
    CHECK(holds(at(&peer, 0), CHUNK, 7));
    /* A part that is only to be read cannot be replayed, and stays too. */
    permission reading = {{1, 0}, 1};
    CUDA(0, SetAccess(s.base + CHUNK, CHUNK, &reading, 1));
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause("a", NULL, &report));
    CHECK(report.bytes_moved == CHUNK && device_used(0) == 2ull * CHUNK && holds(at(&peer, 0), CHUNK, 7));
    OK(sire_resume("a", NULL, NULL));
    CUDA(0, Unmap(peer.base, CHUNK));
    CUDA(0, Release(imported));
    dropped(&peer);
    /* A segment with memory of two regions is not paused for one of them. */
    uint32_t b = region_of("b", 1);
    OK(sire_region_enter(b, 0));
    CUDA(0, grow(&s, 3, 4));
    OK(sire_region_leave(b));
    EXPECT(SIRE_STATUS_UNSUPPORTED, sire_pause("a", NULL, NULL));
    SAYS("'b'");
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));
    /* Memory that was made and is not mapped yet. */
    OK(sire_region_enter(a, 0));
    Handle hand = 0;
    CUDA(0, Create(&hand, CHUNK, &torch_asks, 0));
    OK(sire_region_leave(a));
    EXPECT(SIRE_STATUS_BUSY, sire_pause(NULL, NULL, NULL));
    SAYS("not mapped yet");
    CUDA(0, Release(hand));
    shrink(&s, 0, 4);
    dropped(&s);
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    /* A kind of handle that this device does not have: PyTorch asks for it, and tries another. */
    properties fabric = torch_asks;
    fabric.handle_types = 8;
    OK(sire_region_enter(a, 0));
    CUDA(801, Create(&hand, CHUNK, &fabric, 0));
    fabric.where.id = 77;
    CHECK(Create(&hand, CHUNK, &fabric, 0) != 0);
    CHECK(Create(NULL, CHUNK, &torch_asks, 0) == 1 && Create(&hand, CHUNK, NULL, 0) == 1);
    CHECK(Create(&hand, CHUNK, &torch_asks, 5) == 1);
    OK(sire_region_leave(a));
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int off = !strcmp(argv[1], "off");
    look_all_up(!off);
    CUDA(0, cudaFree(NULL));
    if (!strcmp(argv[1], "regions")) regions();
    else if (!strcmp(argv[1], "process")) process_wide();
    else if (!strcmp(argv[1], "odd")) odd();
    else if (!strcmp(argv[1], "refused")) refused();
    else outside();
    return 0;
}
