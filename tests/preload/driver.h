/* The driver's allocating functions, as a table that a program fills in its own way: by linking, by dlsym, by cuGetProcAddress, through a
 * library that brings its own runtime. */
#ifndef DRIVER_H
#define DRIVER_H

#include "support.h"
#include <unistd.h>

typedef unsigned long long Ptr;
typedef struct { int kind, id; } Location;
typedef struct {
    int kind, handle_types;
    Location where;
    void *win32;
    struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} Properties;
typedef struct { int kind, handle_types; Location where; unsigned long long rest[9]; } PoolProperties;
typedef struct { Location where; int flags; } Access;

typedef int (*GetProc)(const char *, void **, int, unsigned long long, int *);
typedef int (*GetProc11)(const char *, void **, int, unsigned long long);

#define DRIVER_FUNCTIONS(X)                                                                                            \
    X(cuInit, cuInit, 2000, (unsigned))                                                                                \
    X(cuMemAlloc, cuMemAlloc_v2, 3020, (Ptr *, size_t))                                                                \
    X(cuMemFree, cuMemFree_v2, 3020, (Ptr))                                                                            \
    X(cuMemAllocPitch, cuMemAllocPitch_v2, 3020, (Ptr *, size_t *, size_t, size_t, unsigned))                          \
    X(cuMemAllocManaged, cuMemAllocManaged, 6000, (Ptr *, size_t, unsigned))                                           \
    X(cuMemAllocAsync, cuMemAllocAsync, 11020, (Ptr *, size_t, void *))                                                \
    X(cuMemFreeAsync, cuMemFreeAsync, 11020, (Ptr, void *))                                                            \
    X(cuMemAllocFromPoolAsync, cuMemAllocFromPoolAsync, 11020, (Ptr *, size_t, void *, void *))                        \
    X(cuMemPoolCreate, cuMemPoolCreate, 11020, (void **, const PoolProperties *))                                      \
    X(cuMemPoolDestroy, cuMemPoolDestroy, 11020, (void *))                                                             \
    X(cuMemPoolSetAccess, cuMemPoolSetAccess, 11020, (void *, const Access *, size_t))                                 \
    X(cuIpcGetMemHandle, cuIpcGetMemHandle, 4010, (void *, Ptr))                                                       \
    X(cuDeviceGetDefaultMemPool, cuDeviceGetDefaultMemPool, 11020, (void **, int))                                     \
    X(cuMemAddressReserve, cuMemAddressReserve, 10020, (Ptr *, size_t, size_t, Ptr, unsigned long long))               \
    X(cuMemAddressFree, cuMemAddressFree, 10020, (Ptr, size_t))                                                        \
    X(cuMemCreate, cuMemCreate, 10020, (Ptr *, size_t, const Properties *, unsigned long long))                        \
    X(cuMemRelease, cuMemRelease, 10020, (Ptr))                                                                        \
    X(cuMemMap, cuMemMap, 10020, (Ptr, size_t, size_t, Ptr, unsigned long long))                                       \
    X(cuMemUnmap, cuMemUnmap, 10020, (Ptr, size_t))                                                                    \
    X(cuMemSetAccess, cuMemSetAccess, 10020, (Ptr, size_t, const Access *, size_t))                                    \
    X(cuMemGetAddressRange, cuMemGetAddressRange_v2, 3020, (Ptr *, size_t *, Ptr))                                     \
    X(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, 7000, (void **, int))                                        \
    X(cuDevicePrimaryCtxReset, cuDevicePrimaryCtxReset_v2, 11000, (int))                                               \
    X(cuCtxCreate, cuCtxCreate_v2, 3020, (void **, unsigned, int))                                                     \
    X(cuCtxDestroy, cuCtxDestroy_v2, 4000, (void *))                                                                   \
    X(cuCtxSetCurrent, cuCtxSetCurrent, 4000, (void *))                                                                \
    X(cuCtxGetCurrent, cuCtxGetCurrent, 4000, (void **))                                                               \
    X(cuCtxEnablePeerAccess, cuCtxEnablePeerAccess, 4000, (void *, unsigned))                                          \
    X(cuCtxDisablePeerAccess, cuCtxDisablePeerAccess, 4000, (void *))                                                  \
    X(cuStreamCreate, cuStreamCreate, 2000, (void **, unsigned))                                                       \
    X(cuStreamDestroy, cuStreamDestroy_v2, 4000, (void *))                                                             \
    X(cuStreamBeginCapture, cuStreamBeginCapture_v2, 10010, (void *, int))                                             \
    X(cuStreamEndCapture, cuStreamEndCapture, 10000, (void *, void **))                                                \
    X(cuStreamBeginCaptureToGraph, cuStreamBeginCaptureToGraph, 12030, (void *, void *, void *const *, const void *, size_t, int)) \
    X(cuGraphCreate, cuGraphCreate, 10000, (void **, unsigned))                                                        \
    X(cuGraphDestroy, cuGraphDestroy, 10000, (void *))                                                                 \
    X(cuMemExportToShareableHandle, cuMemExportToShareableHandle, 10020, (void *, Ptr, int, unsigned long long))       \
    X(cuMemRetainAllocationHandle, cuMemRetainAllocationHandle, 11000, (Ptr *, void *))                                \
    X(cuMemGetAllocationPropertiesFromHandle, cuMemGetAllocationPropertiesFromHandle, 10020, (Properties *, Ptr))      \
    X(cuMemGetHandleForAddressRange, cuMemGetHandleForAddressRange, 11070, (void *, Ptr, size_t, int, unsigned long long)) \
    X(cuMulticastBindMem, cuMulticastBindMem, 12010, (Ptr, size_t, Ptr, size_t, size_t, unsigned long long))           \
    X(cuMulticastBindAddr, cuMulticastBindAddr, 12010, (Ptr, size_t, Ptr, size_t, unsigned long long))

/* Other forms of functions above: a name for the table first. */
#define OTHER_FORMS(X)                                                                                                 \
    X(reset_before_11, cuDevicePrimaryCtxReset, cuDevicePrimaryCtxReset, 7000, (int))                                  \
    X(bind_memory_of, cuMulticastBindMem, cuMulticastBindMem_v2, 13010, (Ptr, int, size_t, Ptr, size_t, size_t, unsigned long long)) \
    X(bind_address_of, cuMulticastBindAddr, cuMulticastBindAddr_v2, 13010, (Ptr, int, size_t, Ptr, size_t, unsigned long long))

#define DECLARE(base, exported, version, arguments) int exported arguments;
DRIVER_FUNCTIONS(DECLARE)
#undef DECLARE
#define DECLARE(member, base, exported, version, arguments) int exported arguments;
OTHER_FORMS(DECLARE)
#undef DECLARE
int cuStreamBeginCaptureToGraph_ptsz(void *, void *, void *const *, const void *, size_t, int), cuStreamBeginCapture_v2_ptsz(void *, int), cuStreamEndCapture_ptsz(void *, void **);
int cuStreamBeginRecaptureToGraph(void *, int, void *, void *, void *), cuStreamBeginRecaptureToGraph_ptsz(void *, int, void *, void *, void *);
int cuMemAllocAsync_ptsz(Ptr *, size_t, void *), cuMemFreeAsync_ptsz(Ptr, void *), cuMemAllocFromPoolAsync_ptsz(Ptr *, size_t, void *, void *);
int cuGetProcAddress(const char *, void **, int, unsigned long long), cuGetProcAddress_v2(const char *, void **, int, unsigned long long, int *);

#define MEMBER(base, exported, version, arguments) int (*base) arguments;
#define OTHER_MEMBER(member, base, exported, version, arguments) int (*member) arguments;
typedef struct { DRIVER_FUNCTIONS(MEMBER) OTHER_FORMS(OTHER_MEMBER) } Driver;
#undef MEMBER
#undef OTHER_MEMBER

/* How a library of fixtures/private.c finds things, and what it does at its start and end. */
typedef void *(*Find)(const char *exported, const char *base, int version, unsigned long long flags);

/* Which file an address is in. */
static inline const char *file_of(void *address) {
    Dl_info where;
    CHECK(address != NULL && dladdr(address, &where) && where.dli_fname);
    const char *slash = strrchr(where.dli_fname, '/');
    return slash ? slash + 1 : where.dli_fname;
}

static inline int in_file(void *address, const char *file) { return strncmp(file_of(address), file, strlen(file)) == 0; }

/* Whether calls through this address are Sire's: its function, or the one that leads there. */
static inline int is_ours(void *address) { return in_file(address, "libsire_alloc") || in_file(address, "libsire_driver"); }

/* No test hangs: the process ends by a signal instead. */
static inline void watchdog(void) { alarm(60); }

#endif
