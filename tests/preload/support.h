/* What the C programs share: the part of CUDA's interface that they call, and checks that say what went wrong. */
#ifndef SUPPORT_H
#define SUPPORT_H

#include "sire.h"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int cudaError;
cudaError cudaMalloc(void **out, size_t bytes);
cudaError cudaFree(void *ptr);
cudaError cudaMallocAsync(void **out, size_t bytes, void *stream);
cudaError cudaFreeAsync(void *ptr, void *stream);
cudaError cudaMemGetInfo(size_t *free_bytes, size_t *total);
cudaError cudaGetDevice(int *device);
cudaError cudaSetDevice(int device);
cudaError cudaGetDeviceCount(int *count);
cudaError cudaGetLastError(void);
cudaError cudaMemcpy(void *to, const void *from, size_t bytes, int kind);
cudaError cudaMemset(void *to, int value, size_t bytes);
cudaError cudaMemsetAsync(void *to, int value, size_t bytes, void *stream);
cudaError cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t bytes);
cudaError cudaDeviceSynchronize(void), cudaDeviceReset(void);
cudaError cudaDeviceEnablePeerAccess(int peer, unsigned flags), cudaDeviceDisablePeerAccess(int peer);
typedef struct { char bytes[64]; } cudaIpcMemHandle;
cudaError cudaIpcGetMemHandle(void *out, void *ptr);
cudaError cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle handle, unsigned flags);
cudaError cudaIpcCloseMemHandle(void *ptr);
cudaError cudaDeviceGetDefaultMemPool(void **pool, int device);
cudaError cudaDeviceSetMemPool(int device, void *pool);
cudaError cudaMemPoolCreate(void **pool, const void *properties), cudaMemPoolDestroy(void *pool);
cudaError cudaMemPoolSetAccess(void *pool, const void *descriptions, size_t count);
cudaError cudaMallocFromPoolAsync(void **out, size_t bytes, void *pool, void *stream);
cudaError cudaStreamCreate(void **stream);
cudaError cudaStreamSynchronize(void *stream);
cudaError cudaStreamDestroy(void *stream);
cudaError cudaStreamBeginCapture(void *stream, int mode);
cudaError cudaStreamBeginCaptureToGraph(void *stream, void *graph, void *const *dependencies, const void *edges, size_t count, int mode);
cudaError cudaStreamBeginRecaptureToGraph(void *stream, int mode, void *graph, void *callback);
cudaError cudaStreamEndCapture(void *stream, void **graph);
cudaError cudaGraphCreate(void **graph, unsigned flags), cudaGraphDestroy(void *graph);
cudaError cudaGetDriverEntryPoint(const char *symbol, void **out, unsigned long long flags, int *status);
cudaError cudaGetDriverEntryPointByVersion(const char *symbol, void **out, unsigned version, unsigned long long flags, int *status);

/* What programs call that were compiled with --default-stream per-thread. */
cudaError cudaMallocAsync_ptsz(void **out, size_t bytes, void *stream), cudaFreeAsync_ptsz(void *ptr, void *stream);
cudaError cudaMallocFromPoolAsync_ptsz(void **out, size_t bytes, void *pool, void *stream);
cudaError cudaMemcpyAsync_ptsz(void *to, const void *from, size_t bytes, int kind, void *stream);
cudaError cudaMemsetAsync_ptsz(void *to, int value, size_t bytes, void *stream), cudaStreamSynchronize_ptsz(void *stream);
cudaError cudaMemcpy_ptds(void *to, const void *from, size_t bytes, int kind), cudaMemset_ptds(void *to, int value, size_t bytes);
cudaError cudaStreamBeginCapture_ptsz(void *stream, int mode), cudaStreamEndCapture_ptsz(void *stream, void **graph);
cudaError cudaStreamBeginCaptureToGraph_ptsz(void *stream, void *graph, void *const *dependencies, const void *edges, size_t count, int mode);
cudaError cudaStreamBeginRecaptureToGraph_ptsz(void *stream, int mode, void *graph, void *callback);
cudaError cudaGetDriverEntryPoint_ptsz(const char *symbol, void **out, unsigned long long flags, int *status);
cudaError cudaGetDriverEntryPointByVersion_ptsz(const char *symbol, void **out, unsigned version, unsigned long long flags, int *status);

enum { TO_DEVICE = 1, TO_HOST = 2 };
enum { KiB = 1 << 10, MiB = 1 << 20 };

/* The condition must hold; else the program ends, with the library's last message. */
#define CHECK(condition)                                                                                              \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            char message_[1024] = "";                                                                                 \
            sire_last_error(message_, sizeof message_);                                                               \
            fprintf(stderr, "%s:%d: %s does not hold (last error: %s)\n", __FILE__, __LINE__, #condition, message_);    \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

/* A sire_* call must answer this. */
#define EXPECT(status_, call)                                                                                         \
    do {                                                                                                              \
        int got_ = (call);                                                                                            \
        if (got_ != (status_)) {                                                                                      \
            char message_[1024] = "";                                                                                 \
            sire_last_error(message_, sizeof message_);                                                               \
            fprintf(stderr, "%s:%d: %s is %s, not %s (last error: %s)\n", __FILE__, __LINE__, #call,                   \
                    sire_status_name(got_), sire_status_name(status_), message_);                                     \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)
#define OK(call) EXPECT(SIRE_STATUS_OK, call)

/* A cuda* call must answer this. */
#define CUDA(code_, call)                                                                                             \
    do {                                                                                                              \
        int got_ = (call);                                                                                            \
        if (got_ != (code_)) {                                                                                        \
            char message_[1024] = "";                                                                                 \
            sire_last_error(message_, sizeof message_);                                                               \
            fprintf(stderr, "%s:%d: %s is %d, not %d (last error: %s)\n", __FILE__, __LINE__, #call, got_, code_, message_); \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

/* The last message must mention this. */
#define SAYS(words)                                                                                                   \
    do {                                                                                                              \
        char message_[1024] = "";                                                                                     \
        sire_last_error(message_, sizeof message_);                                                                   \
        if (!strstr(message_, words)) {                                                                               \
            fprintf(stderr, "%s:%d: the message does not mention \"%s\": %s\n", __FILE__, __LINE__, words, message_);    \
            exit(1);                                                                                                  \
        }                                                                                                             \
    } while (0)

/* A region with this backup (0 none, 1 host, 2 disk). */
static inline uint32_t region_of(const char *tag, int backup) {
    sire_region_options options = {.struct_size = sizeof options, .backup = backup};
    uint32_t region = UINT32_MAX;
    OK(sire_region_open(tag, &options, &region));
    CHECK(region != UINT32_MAX);
    return region;
}

/* cudaMalloc inside the region. */
static inline void *allocate_in(uint32_t region, size_t bytes) {
    void *out = NULL;
    OK(sire_region_enter(region, 0));
    CUDA(0, cudaMalloc(&out, bytes));
    OK(sire_region_leave(region));
    CHECK(out != NULL);
    return out;
}

static inline unsigned char byte_at(unsigned seed, size_t index) {
    return (unsigned char)(seed * 131 + index * 7 + (index >> 12) * 13);
}

/* Fills device memory with a pattern that differs at every address and for every seed. */
static inline void fill(void *device, size_t bytes, unsigned seed) {
    unsigned char *host = malloc(bytes);
    CHECK(host != NULL);
    for (size_t i = 0; i < bytes; i++) host[i] = byte_at(seed, i);
    CUDA(0, cudaMemcpy(device, host, bytes, TO_DEVICE));
    free(host);
}

/* Whether device memory still holds the pattern. */
static inline int holds(const void *device, size_t bytes, unsigned seed) {
    unsigned char *host = malloc(bytes);
    CHECK(host != NULL);
    CUDA(0, cudaMemcpy(host, device, bytes, TO_HOST));
    size_t i = 0;
    while (i < bytes && host[i] == byte_at(seed, i)) i++;
    if (i < bytes) fprintf(stderr, "byte %zu of %zu is %u, not %u\n", i, bytes, host[i], byte_at(seed, i));
    free(host);
    return i == bytes;
}

static inline size_t free_bytes(void) {
    size_t free_now = 0, total = 0;
    CUDA(0, cudaMemGetInfo(&free_now, &total));
    return free_now;
}

/* Physical bytes in use on the device, all processes together: the software device's own count, not ours. */
static inline uint64_t device_used(int device) {
    uint64_t (*used)(int) = (uint64_t(*)(int))dlsym(RTLD_DEFAULT, "sire_sim_used");
    if (used) return used(device);
    size_t free_now = 0, total = 0;
    int before = 0;
    CUDA(0, cudaGetDevice(&before));
    CUDA(0, cudaSetDevice(device));
    CUDA(0, cudaMemGetInfo(&free_now, &total));
    CUDA(0, cudaSetDevice(before));
    return total - free_now;
}

/* Makes the software device's functions fail from now on, as its fault plan says; "" ends it. */
static inline void device_fault(const char *plan) {
    int (*fault)(const char *) = (int (*)(const char *))dlsym(RTLD_DEFAULT, "sire_sim_fault");
    CHECK(fault != NULL);
    CUDA(0, fault(plan));
}

/* A number out of the statistics: the n-th "name": of the JSON, behind `after`. */
static inline long statistic(const char *after, const char *name) {
    size_t length = 0;
    OK(sire_stats_json(NULL, 0, &length));
    char *text = malloc(length + 1), key[64];
    OK(sire_stats_json(text, length + 1, &length));
    char *at = strstr(text, after);
    CHECK(at != NULL);
    snprintf(key, sizeof key, "\"%s\":", name);
    at = strstr(at, key);
    CHECK(at != NULL);
    long value = strtol(at + strlen(key), NULL, 10);
    free(text);
    return value;
}

#endif
