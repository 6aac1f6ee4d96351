/* Memory at driver level on the software device. argv: WAY [LIBRARY] [MODE], with ways
 *   linked  calls of the driver's names, bound by the loader
 *   dlsym   by handle;  proc, proc11  cuGetProcAddress in CUDA 12's and 11's convention;  stream  the same, with per-thread default streams
 *   private a library of fixtures/private.c, in MODE local, global, deepbind, twice
 * and, last, what is expected: `heard` or `deaf`. */
#define _GNU_SOURCE
#include "driver.h"

static Driver D;

static void *find(const char *way, const char *exported, const char *base, int version, Find private) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), *found = NULL;
    CHECK(library != NULL);
    if (!strcmp(way, "private")) return private(exported, base, version, 0);
    if (!strcmp(way, "dlsym")) return dlsym(library, exported);
    if (!strcmp(way, "proc11")) {
        CUDA(0, ((GetProc11)dlsym(library, "cuGetProcAddress"))(base, &found, version, 0));
        return found;
    }
    CUDA(0, ((GetProc)dlsym(library, "cuGetProcAddress_v2"))(base, &found, version, !strcmp(way, "stream") ? 2 : 0, NULL));
    return found;
}

static void fill_table(const char *way, Find private) {
#define FIND(base, exported, version, arguments) *(void **)&D.base = find(way, #exported, #base, version, private);
#define LINKED(base, exported, version, arguments) D.base = exported;
#define FIND_FORM(member, base, exported, version, arguments) *(void **)&D.member = find(way, #exported, #base, version, private);
#define LINKED_FORM(member, base, exported, version, arguments) D.member = exported;
    if (!strcmp(way, "linked")) {
        DRIVER_FUNCTIONS(LINKED)
        OTHER_FORMS(LINKED_FORM)
    } else {
        DRIVER_FUNCTIONS(FIND)
        OTHER_FORMS(FIND_FORM)
    }
}

static void *at(Ptr ptr) { return (void *)(uintptr_t)ptr; }

static void with_context(int device) {
    void *context = NULL;
    CUDA(0, D.cuInit(0));
    CUDA(0, D.cuDevicePrimaryCtxRetain(&context, device));
    CUDA(0, D.cuCtxSetCurrent(context));
}

/* Pause and resume (by a thread that is inside the region, and leaves it for that) keep the bytes and the address. */
static void survives(uint32_t region, Ptr ptr, size_t bytes) {
    CHECK(sire_owns(at(ptr)));
    fill(at(ptr), bytes, 3);
    OK(sire_region_leave(region));
    uint64_t before = device_used(0);
    OK(sire_pause("r", NULL, NULL));
    CHECK(device_used(0) <= before - bytes);
    OK(sire_resume("r", NULL, NULL));
    CHECK(holds(at(ptr), bytes, 3));
    OK(sire_region_enter(region, 0));
}

static void linear(uint32_t region, int heard) {
    Ptr plain = 0, ours = 0, base = 0;
    size_t size = 0;
    long passed = statistic("driver_hooks", "allocate");
    CUDA(0, D.cuMemAlloc(&plain, 3 * MiB));
    CHECK(!sire_owns(at(plain)) && statistic("driver_hooks", "allocate") == passed + heard);
    OK(sire_region_enter(region, 0));
    CUDA(0, D.cuMemAlloc(&ours, 3 * MiB));
    CHECK(sire_owns(at(ours)) == heard);
    if (heard) survives(region, ours, 3 * MiB);
    CUDA(0, D.cuMemGetAddressRange(&base, &size, ours + MiB));
    /* Of Sire's it is what a handle of it stands for. */
    CHECK(base == ours && size == (heard ? 4 : 3) * (size_t)MiB);
    /* Other processes get a handle of what is the driver's own. */
    char token[64];
    CUDA(heard ? 801 : 0, D.cuIpcGetMemHandle(token, ours + MiB));
    if (heard) SAYS("is in region 'r', and cuIpcGetMemHandle cannot hand such memory to another process");
    CUDA(0, D.cuIpcGetMemHandle(token, plain));
    /* What the driver refuses, it refuses itself. */
    CHECK(D.cuMemAlloc(NULL, MiB) == 1 && D.cuMemAlloc(&base, 0) == 1);
    CUDA(2, D.cuMemAlloc(&base, (size_t)1 << 40));
    OK(sire_region_leave(region));
    CUDA(0, D.cuMemFree(ours));
    CUDA(0, D.cuMemFree(plain));
    CUDA(1, D.cuMemFree(ours + 8));
    /* Without a context there is nothing to allocate in, and the driver says so. */
    CUDA(0, D.cuCtxSetCurrent(NULL));
    OK(sire_region_enter(region, 0));
    CUDA(201, D.cuMemAlloc(&base, MiB));
    OK(sire_region_leave(region));
    with_context(0);
}

/* A pause waits for the primary context only: what another context may use is not ours. */
static void in_a_context_of_its_own(uint32_t region) {
    void *own = NULL;
    Ptr ptr = 0;
    CUDA(0, D.cuCtxCreate(&own, 0, 0));
    OK(sire_region_enter(region, 0));
    long passed = statistic("driver_hooks", "allocate");
    CUDA(0, D.cuMemAlloc(&ptr, 3 * MiB));
    CHECK(!sire_owns(at(ptr)) && statistic("driver_hooks", "allocate") == passed + 1);
    CUDA(0, D.cuMemFree(ptr));
    CUDA(0, D.cuCtxDestroy(own));
    with_context(0);
    CUDA(0, D.cuMemAlloc(&ptr, 3 * MiB));
    CHECK(sire_owns(at(ptr)));
    CUDA(0, D.cuMemFree(ptr));
    OK(sire_region_leave(region));
}

static void in_stream_order(uint32_t region) {
    void *stream = NULL, *pool = NULL, *own = NULL, *shared = NULL;
    Ptr ptr = 0;
    CUDA(0, D.cuStreamCreate(&stream, 1));
    CUDA(0, D.cuDeviceGetDefaultMemPool(&pool, 0));
    PoolProperties asked = {.kind = 1, .where = {1, 0}};
    CUDA(0, D.cuMemPoolCreate(&own, &asked));
    asked.handle_types = 1;
    CUDA(0, D.cuMemPoolCreate(&shared, &asked));
    OK(sire_region_enter(region, 0));
    CUDA(0, D.cuMemAllocAsync(&ptr, 3 * MiB, stream));
    survives(region, ptr, 3 * MiB);
    CUDA(0, D.cuMemFreeAsync(ptr, stream));
    CUDA(0, D.cuMemAllocAsync(&ptr, 3 * MiB, NULL));
    survives(region, ptr, 3 * MiB);
    CUDA(0, D.cuMemFreeAsync(ptr, NULL));
    void *pools[] = {pool, own};
    for (int i = 0; i < 2; i++) {
        CUDA(0, D.cuMemAllocFromPoolAsync(&ptr, 3 * MiB, pools[i], stream));
        survives(region, ptr, 3 * MiB);
        CUDA(0, D.cuMemFreeAsync(ptr, stream));
    }
    /* Memory that may be handed to other processes, and what is Sire's in no way. */
    long pool_calls = statistic("driver_hooks", "pool"), managed = statistic("driver_hooks", "managed"), pitch = statistic("driver_hooks", "pitch");
    CUDA(0, D.cuMemAllocFromPoolAsync(&ptr, MiB, shared, stream));
    CHECK(!sire_owns(at(ptr)) && statistic("driver_hooks", "pool") == pool_calls + 1);
    CUDA(0, D.cuMemFreeAsync(ptr, stream));
    CUDA(0, D.cuMemAllocManaged(&ptr, MiB, 1));
    CHECK(!sire_owns(at(ptr)) && statistic("driver_hooks", "managed") == managed + 1);
    CUDA(0, D.cuMemFree(ptr));
    size_t row = 0;
    CUDA(0, D.cuMemAllocPitch(&ptr, &row, 1000, 100, 4));
    CHECK(row >= 1000 && !sire_owns(at(ptr)) && statistic("driver_hooks", "pitch") == pitch + 1);
    CUDA(0, D.cuMemFree(ptr));
    OK(sire_region_leave(region));
    /* A pool that is gone is not known any more. */
    CUDA(0, D.cuMemPoolDestroy(own));
    CHECK(D.cuMemAllocFromPoolAsync(&ptr, MiB, own, stream) != 0);
    CUDA(0, D.cuMemPoolDestroy(shared));
    CUDA(0, D.cuStreamDestroy(stream));
}

/* Memory that a library maps itself, and what it may do between. */
static void mapped(uint32_t region) {
    const Properties memory = {.kind = 1, .where = {1, 0}};
    const Access access = {{1, 0}, 3};
    Ptr base = 0, handle = 0;
    OK(sire_region_enter(region, 0));
    CUDA(0, D.cuMemAddressReserve(&base, 8 * MiB, 0, 0, 0));
    CUDA(0, D.cuMemCreate(&handle, 4 * MiB, &memory, 0));
    CUDA(0, D.cuMemMap(base, 4 * MiB, 0, handle, 0));
    CUDA(0, D.cuMemSetAccess(base, 4 * MiB, &access, 1));
    survives(region, base, 4 * MiB);
    OK(sire_region_leave(region));
    CUDA(0, D.cuMemUnmap(base, 4 * MiB));
    CUDA(0, D.cuMemRelease(handle));
    CUDA(0, D.cuMemAddressFree(base, 8 * MiB));
    /* On the host, as NCCL tries: not ours, and the driver's own answer. */
    const Properties on_host = {.kind = 1, .where = {2, 0}};
    OK(sire_region_enter(region, 0));
    CHECK(D.cuMemCreate(&handle, 4 * MiB, &on_host, 0) != 0);
    OK(sire_region_leave(region));
}

/* What a pause and a resume give back meanwhile. */
static uint64_t given_back(void) {
    uint64_t used = device_used(0);
    OK(sire_pause("r", NULL, NULL));
    used -= device_used(0);
    OK(sire_resume("r", NULL, NULL));
    return used;
}

/* The driver hands out what is behind a virtual handle, and then it stays on the device; what it refuses to hand out goes as before. */
static void handed_out(uint32_t region) {
    const Properties memory = {.kind = 1, .handle_types = 1, .where = {1, 0}};
    const Access access = {{1, 0}, 3};
    Properties found = {0};
    Ptr base = 0, handle = 0, again = 0, linear = 0;
    char token[64];
    int descriptor = -1;
    OK(sire_region_enter(region, 0));
    CUDA(0, D.cuMemAddressReserve(&base, 4 * MiB, 0, 0, 0));
    CUDA(0, D.cuMemCreate(&handle, 4 * MiB, &memory, 0));
    CUDA(0, D.cuMemMap(base, 4 * MiB, 0, handle, 0));
    CUDA(0, D.cuMemSetAccess(base, 4 * MiB, &access, 1));
    CUDA(0, D.cuMemAlloc(&linear, 2 * MiB));
    OK(sire_region_leave(region));
    CUDA(0, D.cuMemGetAllocationPropertiesFromHandle(&found, handle));
    CHECK(found.kind == 1 && found.handle_types == 1 && found.where.kind == 1 && found.where.id == 0);
    CUDA(0, D.cuMemRetainAllocationHandle(&again, at(base + MiB)));
    CHECK(again == handle);
    CUDA(0, D.cuMemRelease(again));
    /* 801: the driver has no such objects. It was given its own handle, and memory that it knows: else it were 1 and 500. */
    CUDA(1, D.cuMemExportToShareableHandle(token, handle, 8, 0));
    CUDA(801, D.cuMulticastBindMem(1, 0, handle, 0, 4 * MiB, 0));
    CUDA(801, D.bind_memory_of(1, 0, 0, handle, 0, 4 * MiB, 0));
    CUDA(801, D.cuMulticastBindAddr(1, 0, linear, 2 * MiB, 0));
    CUDA(801, D.bind_address_of(1, 0, 0, linear, 2 * MiB, 0));
    CUDA(801, D.cuMemGetHandleForAddressRange(&descriptor, linear, 2 * MiB, 1, 0));
    CUDA(1, D.cuMemRetainAllocationHandle(NULL, at(linear)));
    CHECK(given_back() == 6 * MiB);
    CUDA(0, D.cuMemExportToShareableHandle(&descriptor, handle, 1, 0));
    CHECK(descriptor >= 0 && close(descriptor) == 0);
    CHECK(given_back() == 2 * MiB);
    CUDA(0, D.cuMemRetainAllocationHandle(&again, at(linear)));
    CHECK(given_back() == 0);
    CUDA(0, D.cuMemRelease(again));
    CUDA(0, D.cuMemFree(linear));
    CUDA(0, D.cuMemUnmap(base, 4 * MiB));
    CUDA(0, D.cuMemRelease(handle));
    CUDA(0, D.cuMemAddressFree(base, 4 * MiB));
    /* That a bind or a dma-buf went well is the fault plan's word. */
    for (int way = 0; way < 3; way++) {
        OK(sire_region_enter(region, 0));
        CUDA(0, D.cuMemAlloc(&linear, 2 * MiB));
        OK(sire_region_leave(region));
        CHECK(given_back() == 2 * MiB);
        device_fault("cuMulticastBindAddr=error:0; cuMulticastBindAddr_v2=error:0; cuMemGetHandleForAddressRange=error:0");
        if (way == 0) CUDA(0, D.cuMulticastBindAddr(1, 0, linear, 2 * MiB, 0));
        if (way == 1) CUDA(0, D.bind_address_of(1, 0, 0, linear, 2 * MiB, 0));
        if (way == 2) CUDA(0, D.cuMemGetHandleForAddressRange(&descriptor, linear, 2 * MiB, 1, 0));
        device_fault("");
        CHECK(given_back() == 0);
        CUDA(0, D.cuMemFree(linear));
    }
}

/* Captures of the thread's own stream, by the names that are for it. */
static void captures_of_this_thread(const char *way) {
    int (*begin)(void *, int) = cuStreamBeginCapture_v2_ptsz, (*end)(void *, void **) = cuStreamEndCapture_ptsz;
    int (*begin_to)(void *, void *, void *const *, const void *, size_t, int) = cuStreamBeginCaptureToGraph_ptsz;
    int (*begin_again)(void *, int, void *, void *, void *) = cuStreamBeginRecaptureToGraph_ptsz;
    if (strcmp(way, "linked")) {
        const char *how = strcmp(way, "dlsym") ? "stream" : "dlsym";
        *(void **)&begin = find(how, "cuStreamBeginCapture_v2_ptsz", "cuStreamBeginCapture", 10010, NULL);
        *(void **)&end = find(how, "cuStreamEndCapture_ptsz", "cuStreamEndCapture", 10000, NULL);
        *(void **)&begin_to = find(how, "cuStreamBeginCaptureToGraph_ptsz", "cuStreamBeginCaptureToGraph", 12030, NULL);
        /* CUDA 13.3's, for which the software device's driver is too old to be asked otherwise. */
        *(void **)&begin_again = find("dlsym", "cuStreamBeginRecaptureToGraph_ptsz", NULL, 0, NULL);
    }
    void *into = NULL, *graph = NULL;
    CUDA(0, D.cuGraphCreate(&into, 0));
    for (int to_graph = 0; to_graph < 2; to_graph++) {
        CUDA(0, to_graph ? begin_to(NULL, into, NULL, NULL, 0, 2) : begin(NULL, 2));
        EXPECT(SIRE_STATUS_CAPTURING, sire_pause("r", NULL, NULL));
        CUDA(0, end(NULL, &graph));
        CHECK(graph != NULL && (graph == into) == to_graph);
        CUDA(0, begin_again(NULL, 2, graph, NULL, NULL));
        EXPECT(SIRE_STATUS_CAPTURING, sire_pause("r", NULL, NULL));
        void *again = NULL;
        CUDA(0, end(NULL, &again));
        CHECK(again == graph);
        CUDA(0, D.cuGraphDestroy(graph));
        CHECK(given_back() == 0);
    }
}

/* While a capture is in progress nothing is paused, whoever began it. */
static void captures(uint32_t region) {
    void *stream = NULL, *graph = NULL;
    CUDA(0, D.cuStreamCreate(&stream, 1));
    CUDA(0, D.cuStreamBeginCapture(stream, 2));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("r", NULL, NULL));
    CUDA(0, D.cuStreamEndCapture(stream, &graph));
    OK(sire_pause("r", NULL, NULL));
    OK(sire_resume("r", NULL, NULL));
    CUDA(0, D.cuGraphDestroy(graph));
    /* A stream that goes takes its capture along. */
    CUDA(0, D.cuStreamBeginCapture(stream, 2));
    CUDA(0, D.cuStreamDestroy(stream));
    OK(sire_pause("r", NULL, NULL));
    OK(sire_resume("r", NULL, NULL));
    /* Begun by the runtime, ended by the driver, and the other way round. */
    CUDA(0, cudaStreamCreate(&stream));
    CUDA(0, cudaStreamBeginCapture(stream, 2));
    CUDA(0, D.cuStreamEndCapture(stream, &graph));
    CUDA(0, D.cuStreamBeginCapture(stream, 2));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("r", NULL, NULL));
    CUDA(0, cudaStreamEndCapture(stream, &graph));
    OK(sire_pause("r", NULL, NULL));
    OK(sire_resume("r", NULL, NULL));
    /* Into a graph of the program's. */
    void *into = NULL;
    CUDA(0, D.cuGraphCreate(&into, 0));
    CUDA(0, D.cuStreamBeginCaptureToGraph(stream, into, NULL, NULL, 0, 2));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("r", NULL, NULL));
    CUDA(0, D.cuStreamEndCapture(stream, &graph));
    CHECK(graph == into);
    CUDA(0, cuStreamBeginRecaptureToGraph(stream, 2, into, NULL, NULL));
    EXPECT(SIRE_STATUS_CAPTURING, sire_pause("r", NULL, NULL));
    CUDA(0, D.cuStreamEndCapture(stream, &graph));
    CHECK(graph == into);
    CUDA(0, D.cuGraphDestroy(into));
    CHECK(D.cuStreamBeginCaptureToGraph(stream, into, NULL, NULL, 0, 2) != 0); /* it is gone */
    OK(sire_pause("r", NULL, NULL));
    OK(sire_resume("r", NULL, NULL));
    (void)region;
}

static void peers(uint32_t region) {
    void *first = NULL, *second = NULL;
    Ptr ptr = 0;
    CUDA(0, D.cuDevicePrimaryCtxRetain(&first, 0));
    CUDA(0, D.cuDevicePrimaryCtxRetain(&second, 1));
    CUDA(0, D.cuCtxSetCurrent(second));
    CUDA(0, D.cuCtxEnablePeerAccess(first, 0));
    void *current = NULL;
    CUDA(0, D.cuCtxGetCurrent(&current));
    CHECK(current == second);
    CUDA(0, D.cuCtxSetCurrent(first));
    OK(sire_region_enter(region, 0));
    CUDA(0, D.cuMemAlloc(&ptr, 3 * MiB));
    OK(sire_region_leave(region));
    /* The software device: 3 is reading and writing. */
    int (*allowed)(unsigned long long *, const Location *, Ptr) = (int (*)(unsigned long long *, const Location *, Ptr))dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuMemGetAccess");
    CHECK(allowed != NULL);
    for (int round = 0; round < 2; round++) {
        unsigned long long flags = 0;
        const Location other = {1, 1};
        CUDA(0, allowed(&flags, &other, ptr));
        CHECK(flags == 3);
        OK(sire_pause("r", NULL, NULL));
        OK(sire_resume("r", NULL, NULL));
    }
    /* Taken back. */
    CUDA(0, D.cuCtxSetCurrent(second));
    CUDA(0, D.cuCtxDisablePeerAccess(first));
    CHECK(D.cuCtxDisablePeerAccess(first) == 705);
    CUDA(0, D.cuCtxGetCurrent(&current));
    CHECK(current == second);
    CUDA(0, D.cuCtxSetCurrent(first));
    for (int round = 0; round < 2; round++) {
        unsigned long long flags = 9;
        const Location other = {1, 1};
        CUDA(0, allowed(&flags, &other, ptr));
        CHECK(flags == 0);
        OK(sire_pause("r", NULL, NULL));
        OK(sire_resume("r", NULL, NULL));
    }
    CUDA(0, D.cuMemFree(ptr));

    /* A pool that a peer may use: what Sire gives in its place may be used, too, what is there and what comes. */
    Ptr before = 0, after = 0;
    void *pool = NULL;
    const Location first_device = {1, 0};
    const Access access[] = {{{1, 1}, 3}, {{1, 0}, 3}};
    CUDA(0, D.cuDeviceGetDefaultMemPool(&pool, 1));
    CUDA(0, D.cuCtxSetCurrent(second));
    OK(sire_region_enter(region, 0));
    CUDA(0, D.cuMemAllocFromPoolAsync(&before, 3 * MiB, pool, NULL));
    unsigned long long flags = 9;
    CUDA(0, allowed(&flags, &first_device, before));
    CHECK(flags == 0);
    CHECK(D.cuMemPoolSetAccess(NULL, access, 2) != 0);
    CUDA(0, D.cuMemPoolSetAccess(pool, access, 2));
    CUDA(0, D.cuMemAllocFromPoolAsync(&after, 3 * MiB, pool, NULL));
    OK(sire_region_leave(region));
    for (int round = 0; round < 2; round++) {
        const Ptr both[] = {before, after};
        for (int i = 0; i < 2; i++) {
            CUDA(0, allowed(&flags, &first_device, both[i]));
            CHECK(flags == 3);
        }
        OK(sire_pause("r", NULL, NULL));
        OK(sire_resume("r", NULL, NULL));
    }
    /* Taken back by the word; a pool that is destroyed takes along what was given through it. */
    const Access none[] = {{{1, 0}, 0}};
    void *other_pool = NULL;
    const PoolProperties asked = {.kind = 1, .where = {1, 1}};
    CUDA(0, D.cuMemPoolCreate(&other_pool, &asked));
    CUDA(0, D.cuMemPoolSetAccess(other_pool, access, 2));
    CUDA(0, D.cuMemPoolSetAccess(pool, none, 1));
    CUDA(0, allowed(&flags, &first_device, after));
    CHECK(flags == 3);
    CUDA(0, D.cuMemPoolDestroy(other_pool));
    for (int round = 0; round < 2; round++) {
        const Ptr both[] = {before, after};
        for (int i = 0; i < 2; i++) {
            CUDA(0, allowed(&flags, &first_device, both[i]));
            CHECK(flags == 0);
        }
        OK(sire_pause("r", NULL, NULL));
        OK(sire_resume("r", NULL, NULL));
    }
    CUDA(0, D.cuMemFreeAsync(before, NULL));
    CUDA(0, D.cuMemFreeAsync(after, NULL));
    CUDA(0, D.cuCtxSetCurrent(first));
}

/* What cudaMalloc took out of a reservation goes back there, also where the driver frees it. It stayed noted as taken, for as long as the process lived. */
static void reserved(void) {
    sire_reserve_options wish = {.struct_size = sizeof wish, .bytes = 16 * MiB, .fence = 2};
    sire_reservation_report report = {.struct_size = sizeof report};
    sire_reservation *reservation = NULL;
    void *ptr = NULL;
    OK(sire_reserve(0, &wish, &reservation));
    CUDA(0, cudaMalloc(&ptr, 8 * MiB));
    OK(sire_reservation_get(reservation, &report));
    CHECK(report.unused_bytes == 8 * MiB);
    CUDA(0, D.cuMemFree((uintptr_t)ptr));
    OK(sire_reservation_get(reservation, &report));
    CHECK(report.unused_bytes == 16 * MiB);
    OK(sire_reservation_release(reservation));
}

/* The primary context goes, and with it what was allocated; in the next one everything works. */
static void reset(uint32_t region, int (*reset_context)(int)) {
    Ptr ptr = 0;
    OK(sire_region_enter(region, 0));
    CUDA(0, D.cuMemAlloc(&ptr, 3 * MiB));
    uint64_t used = device_used(0);
    CUDA(0, reset_context(0));
    CHECK(!sire_owns(at(ptr)) && used - device_used(0) >= 3 * MiB);
    with_context(0);
    CUDA(0, D.cuMemAlloc(&ptr, 3 * MiB));
    survives(region, ptr, 3 * MiB);
    OK(sire_region_leave(region));
    CUDA(0, D.cuMemFree(ptr));
}

int main(int argc, char **argv) {
    CHECK(argc >= 3);
    watchdog();
    const char *way = argv[1], *mode = argc > 3 ? argv[3] : "";
    int heard = !strcmp(argv[argc - 1], "heard");
    void *library = NULL;
    Find private = NULL;
    if (!strcmp(way, "private")) {
        int flags = RTLD_NOW | (!strcmp(mode, "global") ? RTLD_GLOBAL : RTLD_LOCAL) | (!strcmp(mode, "deepbind") ? RTLD_DEEPBIND : 0);
        library = dlopen(argv[2], flags);
        if (!library) fprintf(stderr, "%s\n", dlerror());
        CHECK(library != NULL);
        private = (Find)dlsym(library, "private_find");
        CHECK(private != NULL);
    }
    fill_table(way, private);
    uint32_t region = region_of("r", 1);
    with_context(0);
    linear(region, heard);
    if (heard) {
        in_a_context_of_its_own(region);
        in_stream_order(region);
        mapped(region);
        handed_out(region);
        captures(region);
        if (getenv("TORCHTOOLS_LOCK_DIR")) reserved();
        captures_of_this_thread(way);
        int devices = 0;
        CUDA(0, cudaGetDeviceCount(&devices));
        if (devices > 1) peers(region);
        reset(region, D.cuDevicePrimaryCtxReset);
        reset(region, D.reset_before_11);
    }
    CHECK(cudaGetLastError() == 0);
    if (library) {
        /* Alive when the library's destructor runs: at exit, or at its dlclose. */
        Ptr ptr = 0;
        CUDA(0, D.cuMemAlloc(&ptr, MiB));
        ((void (*)(Ptr))dlsym(library, "private_keep"))(ptr);
        if (!strcmp(mode, "local")) CUDA(0, dlclose(library));
    }
    return 0;
}
