/* What the test programs need of CUDA's interfaces, declared by hand. Statuses are plain ints. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef void *stream_t, *event_t, *graph_t, *exec_t, *ctx_t;
typedef uint64_t ptr_t;
typedef struct { int kind, id; } location_t;
typedef struct { int kind, handle_types; location_t location; void *meta; unsigned char flags[8]; } prop_t;
typedef struct { location_t location; int flags; } access_t;

/* runtime */
int cudaMalloc(void **, size_t), cudaFree(void *), cudaMallocAsync(void **, size_t, stream_t), cudaFreeAsync(void *, stream_t);
int cudaMallocManaged(void **, size_t, unsigned), cudaHostAlloc(void **, size_t, unsigned), cudaFreeHost(void *), cudaHostGetFlags(unsigned *, void *);
int cudaHostRegister(void *, size_t, unsigned), cudaHostUnregister(void *), cudaMemGetInfo(size_t *, size_t *), cudaPointerGetAttributes(void *, const void *);
int cudaMemcpy(void *, const void *, size_t, int), cudaMemcpyAsync(void *, const void *, size_t, int, stream_t), cudaMemset(void *, int, size_t);
int cudaMemcpy2D(void *, size_t, const void *, size_t, size_t, size_t, int), cudaMemcpyPeer(void *, int, const void *, int, size_t);
int cudaMemsetAsync(void *, int, size_t, stream_t), cudaGetDeviceCount(int *), cudaGetDevice(int *), cudaSetDevice(int), cudaDeviceSynchronize(void), cudaDeviceReset(void);
int cudaGetDeviceProperties(void *, int), cudaDeviceGetAttribute(int *, int, int), cudaGetLastError(void), cudaPeekAtLastError(void);
int cudaDeviceCanAccessPeer(int *, int, int), cudaDeviceEnablePeerAccess(int, unsigned), cudaDeviceGetPCIBusId(char *, int, int);
const char *cudaGetErrorName(int), *cudaGetErrorString(int);
int cudaStreamCreateWithFlags(stream_t *, unsigned), cudaStreamDestroy(stream_t), cudaStreamSynchronize(stream_t), cudaStreamQuery(stream_t), cudaStreamWaitEvent(stream_t, event_t, unsigned);
int cudaEventCreateWithFlags(event_t *, unsigned), cudaEventDestroy(event_t), cudaEventRecord(event_t, stream_t), cudaEventQuery(event_t), cudaEventSynchronize(event_t), cudaEventElapsedTime(float *, event_t, event_t);
int cudaLaunchHostFunc(stream_t, void (*)(void *), void *), cudaStreamBeginCapture(stream_t, int), cudaStreamEndCapture(stream_t, graph_t *), cudaStreamIsCapturing(stream_t, int *);
int cudaThreadExchangeStreamCaptureMode(int *);
int cudaGraphInstantiate(exec_t *, graph_t, unsigned long long), cudaGraphLaunch(exec_t, stream_t), cudaGraphDestroy(graph_t), cudaGraphExecDestroy(exec_t), cudaGraphGetNodes(graph_t, void **, size_t *);
#ifdef CUDA12 /* what CUDA 13 has under the same names with other arguments, and CUDA 12's own names for those */
int cudaGetDeviceProperties_v2(void *, int), cudaEventElapsedTime_v2(float *, event_t, event_t), cudaGetDriverEntryPoint(const char *, void **, unsigned long long, int *);
int cudaStreamGetCaptureInfo(stream_t, int *, unsigned long long *), cudaStreamGetCaptureInfo_v2(stream_t, int *, unsigned long long *, graph_t *, const void ***, size_t *);
int cudaStreamGetCaptureInfo_v3(stream_t, int *, unsigned long long *, graph_t *, const void ***, const void **, size_t *);
int cudaGraphNodeGetDependencies(void *, void **, size_t *), cudaGraphNodeGetDependentNodes(void *, void **, size_t *), cudaGraphGetEdges(graph_t, void **, void **, size_t *);
int cudaGraphNodeGetDependencies_v2(void *, void **, void *, size_t *), cudaGraphGetEdges_v2(graph_t, void **, void **, void *, size_t *);
int cudaMemPrefetchAsync(const void *, size_t, int, stream_t), cudaMemPrefetchAsync_v2(const void *, size_t, location_t, unsigned, stream_t);
int cudaMemAdvise(const void *, size_t, int, int), cudaMemAdvise_v2(const void *, size_t, int, location_t);
#else
int cudaStreamGetCaptureInfo(stream_t, int *, unsigned long long *, graph_t *, const void ***, const void **, size_t *);
int cudaGraphNodeGetDependencies(void *, void **, void *, size_t *), cudaGraphNodeGetDependentNodes(void *, void **, void *, size_t *), cudaGraphGetEdges(graph_t, void **, void **, void *, size_t *);
int cudaMemPrefetchAsync(const void *, size_t, location_t, unsigned, stream_t), cudaMemAdvise(const void *, size_t, int, location_t);
#endif
int cudaRuntimeGetVersion(int *), cudaDriverGetVersion(int *);
int cudaUserObjectCreate(void **, void *, void (*)(void *), unsigned, unsigned), cudaUserObjectRelease(void *, unsigned), cudaGraphRetainUserObject(graph_t, void *, unsigned, unsigned);
int cudaGetDriverEntryPointByVersion(const char *, void **, unsigned, unsigned long long, int *), cudaIpcGetMemHandle(void *, void *);
int cudaDeviceGetDefaultMemPool(void **, int), cudaMemPoolGetAttribute(void *, int, void *), cudaMemPoolTrimTo(void *, size_t);
void **__cudaRegisterFatBinary(void *);
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *), __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int);
typedef struct { unsigned x, y, z; } dim3_t;
int cudaLaunchKernel(const void *, dim3_t, dim3_t, void **, size_t, stream_t), cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, int), cudaMemcpyFromSymbol(void *, const void *, size_t, size_t, int);

/* driver */
int cuStreamGetCaptureInfo(stream_t, int *, unsigned long long *), cuStreamGetCaptureInfo_v2(stream_t, int *, unsigned long long *, graph_t *, const void ***, size_t *);
int cuStreamGetCaptureInfo_v3(stream_t, int *, unsigned long long *, graph_t *, const void ***, const void **, size_t *), cuGetProcAddress(const char *, void **, int, unsigned long long);
int cuCtxCreate_v2(ctx_t *, unsigned, int), cuCtxCreate_v3(ctx_t *, void *, int, unsigned, int), cuCtxCreate_v4(ctx_t *, void *, unsigned, int);
int cuMulticastBindMem(unsigned long long, size_t, unsigned long long, size_t, size_t, unsigned long long), cuMulticastBindAddr(unsigned long long, size_t, ptr_t, size_t, unsigned long long);
int cuMulticastBindMem_v2(unsigned long long, int, size_t, unsigned long long, size_t, size_t, unsigned long long), cuMulticastBindAddr_v2(unsigned long long, int, size_t, ptr_t, size_t, unsigned long long);
int cuMemPrefetchAsync(ptr_t, size_t, int, stream_t), cuMemPrefetchAsync_v2(ptr_t, size_t, location_t, unsigned, stream_t);
int cuInit(unsigned), cuDeviceGet(int *, int), cuDeviceGetCount(int *), cuDevicePrimaryCtxRetain(ctx_t *, int), cuDevicePrimaryCtxRelease_v2(int), cuDevicePrimaryCtxGetState(int, unsigned *, int *);
int cuCtxPushCurrent_v2(ctx_t), cuCtxPopCurrent_v2(ctx_t *), cuCtxGetCurrent(ctx_t *), cuCtxSetCurrent(ctx_t), cuCtxGetDevice(int *), cuCtxSynchronize(void), cuGetErrorName(int, const char **), cuGetErrorString(int, const char **);
int cuMemGetInfo_v2(size_t *, size_t *), cuMemAlloc_v2(ptr_t *, size_t), cuMemFree_v2(ptr_t), cuMemGetAllocationGranularity(size_t *, const prop_t *, int);
int cuMemAddressReserve(ptr_t *, size_t, size_t, ptr_t, unsigned long long), cuMemAddressFree(ptr_t, size_t), cuMemCreate(ptr_t *, size_t, const prop_t *, unsigned long long), cuMemRelease(ptr_t);
int cuMemMap(ptr_t, size_t, size_t, ptr_t, unsigned long long), cuMemUnmap(ptr_t, size_t), cuMemSetAccess(ptr_t, size_t, const access_t *, size_t), cuMemGetAccess(unsigned long long *, const location_t *, ptr_t);
int cuMemRetainAllocationHandle(ptr_t *, void *), cuMemGetAllocationPropertiesFromHandle(prop_t *, ptr_t), cuMemExportToShareableHandle(void *, ptr_t, int, unsigned long long), cuMemImportFromShareableHandle(ptr_t *, void *, int);
int cuMemGetAddressRange_v2(ptr_t *, size_t *, ptr_t), cuPointerGetAttribute(void *, int, ptr_t), cuPointerGetAttributes(unsigned, int *, void **, ptr_t), cuMemcpyDtoHAsync_v2(void *, ptr_t, size_t, stream_t), cuMemcpyHtoDAsync_v2(ptr_t, const void *, size_t, stream_t);
int cuMemsetD8Async(ptr_t, unsigned char, size_t, stream_t), cuMemsetD32Async(ptr_t, unsigned, size_t, stream_t), cuMemcpyDtoH_v2(void *, ptr_t, size_t), cuMemHostRegister_v2(void *, size_t, unsigned), cuMemHostUnregister(void *);
int cuStreamCreateWithPriority(stream_t *, unsigned, int), cuStreamDestroy_v2(stream_t), cuStreamSynchronize(stream_t), cuStreamIsCapturing(stream_t, int *), cuGetProcAddress_v2(const char *, void **, int, unsigned long long, int *);
int cuDeviceGetDefaultMemPool(void **, int), cuMemPoolCreate(void **, const void *), cuMemPoolDestroy(void *), cuMemPoolGetAttribute(void *, int, void *), cuMemAllocFromPoolAsync(ptr_t *, size_t, void *, stream_t);
int cuMemFreeAsync_ptsz(ptr_t, stream_t), cuMemAllocPitch_v2(ptr_t *, size_t *, size_t, size_t, unsigned);

/* NVML */
typedef struct { unsigned long long total, free, used; } nvml_memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } nvml_memory2_t;
typedef struct { unsigned pid; unsigned long long used; } nvml_process1_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } nvml_process_t;
int nvmlInit_v2(void), nvmlDeviceGetCount_v2(unsigned *), nvmlDeviceGetHandleByIndex_v2(unsigned, void **), nvmlDeviceGetHandleByPciBusId_v2(const char *, void **), nvmlDeviceGetHandleByUUID(const char *, void **);
int nvmlDeviceGetUUID(void *, char *, unsigned), nvmlDeviceGetName(void *, char *, unsigned), nvmlDeviceGetMemoryInfo(void *, nvml_memory_t *), nvmlDeviceGetMemoryInfo_v2(void *, nvml_memory2_t *);
int nvmlDeviceGetComputeRunningProcesses(void *, unsigned *, nvml_process1_t *), nvmlDeviceGetComputeRunningProcesses_v3(void *, unsigned *, nvml_process_t *), nvmlDeviceGetNvLinkState(void *, unsigned, unsigned *);

/* the device's own */
int sire_sim_check(void *, size_t, int, int), sire_sim_census(char *, size_t, size_t *), sire_sim_fault(const char *), sire_sim_counters(char *, size_t, size_t *), sire_sim_memfd(int, char *, size_t), sire_sim_set_tag(const char *);
uint64_t sire_sim_used(int);

#define MIB ((size_t)1 << 20)
#define FAIL(...) (fprintf(stderr, __VA_ARGS__), fprintf(stderr, " at %s:%d\n", __FILE__, __LINE__), exit(1))
#define EXPECT(status, call) do { int got_ = (call); if (got_ != (status)) FAIL("%s gave %d, expected %d", #call, got_, (status)); } while (0)
#define OK(call) EXPECT(0, call)
#define CHECK(what) do { if (!(what)) FAIL("not so: %s", #what); } while (0)

static inline prop_t device_memory(int device) {
  prop_t prop = {.kind = 1, .location = {.kind = 1, .id = device}};
  return prop;
}
