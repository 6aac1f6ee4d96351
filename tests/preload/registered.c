/* What a library does that registers buffers for others (NCCL): it asks the driver for the memory around a pointer, takes the handle at the start of
 * that for all of it, and whoever gets the handle maps so many bytes. What was answered was the allocation, while the handle was one of its physical
 * chunks: the other end could not map it, or found a neighbour's bytes. Now the answer is what one handle stands for, as cuPointerGetAttribute has it;
 * in a region that is `whole`, that is the allocation. */
#include "support.h"
#include "virtual.h"
#include <unistd.h>

typedef unsigned long long ull;
enum { RANGE_START_ADDR = 11, RANGE_SIZE = 12, DESCRIPTOR = 1 };
static int (*range_of)(uint64_t *, size_t *, uint64_t), (*attribute)(void *, int, uint64_t), (*retain)(uint64_t *, void *);
static int (*export)(void *, uint64_t, int, ull), (*import)(uint64_t *, void *, int), (*release)(uint64_t);
static int (*reserve)(uint64_t *, size_t, size_t, uint64_t, ull), (*unreserve)(uint64_t, size_t);
static int (*map)(uint64_t, size_t, size_t, uint64_t, ull), (*unmap)(uint64_t, size_t), (*set_access)(uint64_t, size_t, const permission *, size_t);

static void find_functions(void) {
    struct { const char *name; void *place; } wanted[] = {{"cuMemGetAddressRange", &range_of}, {"cuPointerGetAttribute", &attribute},
        {"cuMemRetainAllocationHandle", &retain}, {"cuMemExportToShareableHandle", &export}, {"cuMemImportFromShareableHandle", &import},
        {"cuMemRelease", &release}, {"cuMemAddressReserve", &reserve}, {"cuMemAddressFree", &unreserve}, {"cuMemMap", &map}, {"cuMemUnmap", &unmap},
        {"cuMemSetAccess", &set_access}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        CUDA(0, cudaGetDriverEntryPointByVersion(wanted[i].name, wanted[i].place, 12000, 0, NULL));
}

typedef struct { uint64_t base; size_t bytes; } range;

static range around(const void *ptr) {
    range found = {0};
    CUDA(0, range_of(&found.base, &found.bytes, (uint64_t)ptr));
    CHECK(found.base <= (uint64_t)ptr && (uint64_t)ptr < found.base + found.bytes);
    return found;
}

/* The driver itself is asked, whom no hook hears. */
static int says_the_driver(range said) {
    range known = {0};
    CUDA(0, attribute(&known.base, RANGE_START_ADDR, said.base));
    CUDA(0, attribute(&known.bytes, RANGE_SIZE, said.base));
    return known.base == said.base && known.bytes == said.bytes;
}

/* Somebody else's mapping of the memory around `ptr`. */
static uint64_t registered(range found) {
    const permission own = {{1, 0}, 3};
    uint64_t handle = 0, theirs = 0, at = 0;
    int file = -1;
    CUDA(0, retain(&handle, (void *)found.base));
    CUDA(0, export(&file, handle, DESCRIPTOR, 0));
    CUDA(0, import(&theirs, (void *)(intptr_t)file, DESCRIPTOR));
    close(file);
    CUDA(0, reserve(&at, found.bytes, 0, 0, 0));
    CUDA(0, map(at, found.bytes, 0, theirs, 0));
    CUDA(0, set_access(at, found.bytes, &own, 1));
    CUDA(0, release(theirs));
    CUDA(0, release(handle));
    return at;
}

static void forget(range found, uint64_t at) {
    CUDA(0, unmap(at, found.bytes));
    CUDA(0, unreserve(at, found.bytes));
}

/* Registers all of an allocation; in how many ranges. */
static int registers(char *ours, size_t bytes) {
    int ranges = 0;
    unsigned char *mine = malloc(bytes), *theirs = malloc(bytes);
    CUDA(0, cudaMemcpy(mine, ours, bytes, TO_HOST));
    for (size_t done = 0; done < bytes; ranges++) {
        range found = around(ours + done);
        CHECK(says_the_driver(found));
        uint64_t at = registered(found);
        size_t skipped = (uint64_t)ours + done - found.base, here = found.bytes - skipped;
        if (here > bytes - done) here = bytes - done;
        CUDA(0, cudaMemcpy(theirs, (void *)(at + skipped), here, TO_HOST));
        CHECK(memcmp(theirs, mine + done, here) == 0);
        forget(found, at);
        done += here;
    }
    free(mine);
    free(theirs);
    return ranges;
}

/* Paused memory is where it was, though the driver knows nothing there. */
static void is_the_same_while_paused(const char *tag, char *ours) {
    range before = around(ours);
    OK(sire_pause(tag, NULL, NULL));
    range paused = around(ours);
    CHECK(paused.base == before.base && paused.bytes == before.bytes);
    uint64_t handle = 0;
    CUDA(800, retain(&handle, (void *)paused.base));
    OK(sire_resume(tag, NULL, NULL));
    CHECK(says_the_driver(around(ours)));
}

static void held(const char *tag, uint64_t bytes) {
    sire_report report = {.struct_size = sizeof report};
    OK(sire_pause(tag, NULL, &report));
    CHECK(report.bytes_held == bytes);
    OK(sire_resume(tag, NULL, NULL));
}

int main(void) {
    find_functions();
    uint32_t chunks = region_of("chunks", 1);
    char *large = allocate_in(chunks, 9 * MiB + 5), *small = allocate_in(chunks, 4 * KiB), *neighbour = allocate_in(chunks, 4 * KiB);
    fill(large, 9 * MiB + 5, 1);
    fill(small, 4 * KiB, 2);
    fill(neighbour, 4 * KiB, 3);
    is_the_same_while_paused("chunks", large);
    is_the_same_while_paused("chunks", large + 9 * MiB);
    is_the_same_while_paused("chunks", neighbour);
    CHECK(registers(large, 9 * MiB + 5) == 3);
    held("chunks", 10 * MiB);
    CHECK(registers(small, 4 * KiB) == 1 && registers(neighbour, 4 * KiB) == 1);
    held("chunks", 12 * MiB);
    CHECK(holds(large, 9 * MiB + 5, 1) && holds(small, 4 * KiB, 2) && holds(neighbour, 4 * KiB, 3));

    sire_region_options options = {.struct_size = sizeof options, .backup = 1, .whole = true};
    uint32_t whole = UINT32_MAX;
    OK(sire_region_open("whole", &options, &whole));
    char *buffer = allocate_in(whole, 9 * MiB + 5), *tiny = allocate_in(whole, 4 * KiB);
    fill(buffer, 9 * MiB + 5, 4);
    fill(tiny, 4 * KiB, 5);
    is_the_same_while_paused("whole", buffer + 9 * MiB);
    CHECK(holds(buffer, 9 * MiB + 5, 4));
    CHECK(around(buffer + 9 * MiB).base == (uint64_t)buffer && around(buffer).bytes == 10 * MiB);
    CHECK(registers(buffer, 9 * MiB + 5) == 1 && registers(tiny, 4 * KiB) == 1);
    held("whole", 12 * MiB);
    CHECK(holds(buffer, 9 * MiB + 5, 4) && holds(tiny, 4 * KiB, 5));

    void *ours[] = {large, small, neighbour, buffer, tiny};
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) CUDA(0, cudaFree(ours[i]));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
