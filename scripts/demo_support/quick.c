/* The quick demo: what Sire does, without PyTorch.
 *
 * Loaded with LD_PRELOAD=libsire_alloc.so, on a GPU or on the software device. It opens a region with a host
 * backup, allocates and fills device memory with plain cudaMalloc, pauses, asks the *driver* how much came back,
 * takes that memory itself to prove it is free, resumes, and compares address and bytes.
 * Exit status 0 only if every step held. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sire.h"

static int (*cuda_malloc)(void **, size_t);
static int (*cuda_free)(void *);
static int (*cuda_memcpy)(void *, const void *, size_t, int);
static int (*cuda_mem_get_info)(size_t *, size_t *);
static int (*cuda_device_synchronize)(void);

static int (*region_open)(const char *, const sire_region_options *, uint32_t *);
static int (*region_enter)(uint32_t, int32_t);
static int (*region_leave)(uint32_t);
static int (*sire_pause_)(const char *, const sire_pause_options *, sire_report *);
static int (*sire_resume_)(const char *, const sire_resume_options *, sire_report *);
static size_t (*last_error)(char *, size_t);

static void fail(const char *what) {
    char text[1024] = "";
    if (last_error) last_error(text, sizeof text);
    fprintf(stderr, "FAILED: %s. %s\n", what, text);
    exit(1);
}

#define CHECK(condition) \
    do { if (!(condition)) fail(#condition); } while (0)

static void *symbol(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    if (!found) {
        fprintf(stderr, "FAILED: %s is not in this process. Was the program started with LD_PRELOAD and the CUDA runtime's path?\n", name);
        exit(1);
    }
    return found;
}

static void load(const char *runtime) {
    if (!dlopen(runtime, RTLD_NOW | RTLD_GLOBAL)) {
        fprintf(stderr, "FAILED: cannot load the CUDA runtime %s: %s\n", runtime, dlerror());
        exit(1);
    }
    *(void **)&cuda_malloc = symbol("cudaMalloc");
    *(void **)&cuda_free = symbol("cudaFree");
    *(void **)&cuda_memcpy = symbol("cudaMemcpy");
    *(void **)&cuda_mem_get_info = symbol("cudaMemGetInfo");
    *(void **)&cuda_device_synchronize = symbol("cudaDeviceSynchronize");
    *(void **)&region_open = symbol("sire_region_open");
    *(void **)&region_enter = symbol("sire_region_enter");
    *(void **)&region_leave = symbol("sire_region_leave");
    *(void **)&sire_pause_ = symbol("sire_pause");
    *(void **)&sire_resume_ = symbol("sire_resume");
    *(void **)&last_error = symbol("sire_last_error");
}

static size_t free_bytes(void) {
    size_t available = 0, total = 0;
    CHECK(cuda_mem_get_info(&available, &total) == 0);
    return available;
}

static unsigned char pattern(size_t i) { return (unsigned char)((i * 2654435761u) >> 13); }

static void fill(unsigned char *host, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) host[i] = pattern(i);
}

static void show(const char *step, size_t available, const void *address) {
    printf("  %-28s %8.1f MiB free   address %p\n", step, (double)available / (1 << 20), address);
}

int main(int argc, char **argv) {
    const size_t bytes = (size_t)256 << 20;
    load(argc > 1 ? argv[1] : "libcudart.so.13");
    unsigned char *host = malloc(bytes);
    CHECK(host != NULL);

    sire_region_options options = {.struct_size = sizeof options, .backup = 1};
    uint32_t region = 0;
    CHECK(region_open("quick", &options, &region) == 0);
    CHECK(cuda_free(NULL) == 0);
    const size_t before = free_bytes();

    void *memory = NULL;
    CHECK(region_enter(region, 0) == 0);
    CHECK(cuda_malloc(&memory, bytes) == 0);
    CHECK(region_leave(region) == 0);
    fill(host, bytes);
    CHECK(cuda_memcpy(memory, host, bytes, 1) == 0);
    show("resident", free_bytes(), memory);
    CHECK(before - free_bytes() >= bytes);

    sire_report report = {.struct_size = sizeof report};
    CHECK(sire_pause_("quick", NULL, &report) == 0);
    show("paused", free_bytes(), memory);
    CHECK(free_bytes() + (8u << 20) >= before);
    CHECK(report.bytes_copied == bytes);

    void *other = NULL;
    CHECK(cuda_malloc(&other, free_bytes() - ((size_t)64 << 20)) == 0);
    show("paused, memory taken", free_bytes(), other);
    CHECK(sire_resume_("quick", NULL, NULL) == SIRE_STATUS_OUT_OF_DEVICE_MEMORY || free_bytes() >= bytes);
    CHECK(cuda_free(other) == 0);

    CHECK(sire_resume_("quick", NULL, &report) == 0);
    show("resumed", free_bytes(), memory);
    memset(host, 0, bytes);
    CHECK(cuda_memcpy(host, memory, bytes, 2) == 0);
    for (size_t i = 0; i < bytes; i++)
        if (host[i] != pattern(i)) fail("the bytes after resume are the bytes before pause");
    CHECK(cuda_free(memory) == 0);
    printf("  every byte is back at the same address; resume refused cleanly while the memory was taken\n");
    return 0;
}
