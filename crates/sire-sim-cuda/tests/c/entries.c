/* Driver functions are found by name, as PyTorch and Sire look for them, and work when called so. */
#include "cuda.h"

int main(int argc, char **argv) {
  void *function;
  int status;
  for (int i = 1; i < argc; i++) {
    OK(cudaGetDriverEntryPointByVersion(argv[i], &function, 12000, 0, &status));
    if (function == NULL || status != 0) FAIL("%s is not found (status %d)", argv[i], status);
    OK(cuGetProcAddress_v2(argv[i], &function, 13000, 0, &status));
  }
  OK(cudaGetDriverEntryPointByVersion("cuNoSuchThing", &function, 12000, 0, &status));
  CHECK(function == NULL && status == 1);
  OK(cuGetProcAddress_v2("cudaMalloc", &function, 12000, 0, &status));
  CHECK(function == NULL && status == 1);
  EXPECT(500, cuGetProcAddress("cudaMalloc", &function, 12000, 0));
  CHECK(function == NULL);
  EXPECT(1, cudaGetDriverEntryPointByVersion(NULL, &function, 12000, 0, &status));
  OK(cudaGetDriverEntryPointByVersion("cuMemGetInfo", &function, 12000, 0, NULL));
  CHECK(function == (void *)cuMemGetInfo_v2);

  /* what changed its arguments is found in the form of the version that is asked for, or not at all */
  struct { const char *name; int version; void *form; } forms[] = {
      {"cuGetProcAddress", 11030, cuGetProcAddress},             {"cuGetProcAddress", 12000, cuGetProcAddress_v2},
      {"cuStreamGetCaptureInfo", 10010, cuStreamGetCaptureInfo}, {"cuStreamGetCaptureInfo", 12020, cuStreamGetCaptureInfo_v2},
      {"cuStreamGetCaptureInfo", 12030, cuStreamGetCaptureInfo_v3}, {"cuStreamGetCaptureInfo", 13000, cuStreamGetCaptureInfo_v3},
      {"cuCtxCreate", 11030, cuCtxCreate_v2},                    {"cuCtxCreate", 12040, cuCtxCreate_v3},
      {"cuCtxCreate", 12050, cuCtxCreate_v4},                    {"cuMemPrefetchAsync", 12010, cuMemPrefetchAsync},
      {"cuMemPrefetchAsync", 12020, cuMemPrefetchAsync_v2},      {"cuMulticastBindMem", 12010, cuMulticastBindMem},
      {"cuMulticastBindMem", 13010, cuMulticastBindMem_v2},      {"cuMulticastBindAddr", 13000, cuMulticastBindAddr},
      {"cuMulticastBindAddr", 13010, cuMulticastBindAddr_v2},
  };
  for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
    OK(cuGetProcAddress_v2(forms[i].name, &function, forms[i].version, 0, &status));
    if (function != forms[i].form) FAIL("%s of %d", forms[i].name, forms[i].version);
  }

  /* what is not there yet is told from what is not there at all: since CUDA 12 by the status, before by an error */
  struct { const char *name; int version; } later[] = {{"cuGetProcAddress", 11020}, {"cuMemCreate", 10010}, {"cuMemAlloc", 2000}, {"cuMemAllocAsync", 11010}};
  for (size_t i = 0; i < sizeof later / sizeof *later; i++) {
    for (unsigned long long flags = 0; flags <= 2; flags++) {
      status = -1, function = &status;
      OK(cuGetProcAddress_v2(later[i].name, &function, later[i].version, flags, &status));
      CHECK(function == NULL && status == 2);
      OK(cuGetProcAddress_v2(later[i].name, &function, later[i].version, flags, NULL));
      status = -1, function = &status;
      OK(cudaGetDriverEntryPointByVersion(later[i].name, &function, later[i].version, flags, &status));
      CHECK(function == NULL && status == 2);
      EXPECT(500, cuGetProcAddress(later[i].name, &function, later[i].version, flags));
      OK(cuGetProcAddress_v2(later[i].name, &function, 12000, flags, &status));
      CHECK(function != NULL && status == 0);
    }
  }
  /* nor is anything known of a CUDA that is newer than the driver */
  EXPECT(1, cuGetProcAddress_v2("cuMemAlloc", &function, 99000, 0, &status));
  EXPECT(1, cuGetProcAddress("cuMemAlloc", &function, 99000, 0));
  EXPECT(1, cudaGetDriverEntryPointByVersion("cuMemAlloc", &function, 99000, 0, &status));
  puts("ok");
}
