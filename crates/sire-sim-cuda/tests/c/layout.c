/* Structs are written in their size and not beyond; strings and errors are what CUDA says. */
#include "cuda.h"

int main(void) {
  unsigned char prop[1008 + 64], attributes[24 + 64];
  memset(prop, 0xA5, sizeof prop);
  OK(cudaGetDeviceProperties(prop, 0));
  for (int i = 1008; i < 1008 + 64; i++) CHECK(prop[i] == 0xA5);
  CHECK(strcmp((char *)prop, "Sire software device") == 0);
  size_t total, free_bytes;
  OK(cudaMemGetInfo(&free_bytes, &total));
  CHECK(*(size_t *)(prop + 288) == total && total == 256 * MIB);
  CHECK(*(int *)(prop + 360) == 9 && *(int *)(prop + 384) == 16 && *(int *)(prop + 604) == 2048);
  EXPECT(101, cudaGetDeviceProperties(prop, 2));
  EXPECT(101, cudaGetDeviceProperties(prop, -1));
  EXPECT(1, cudaGetDeviceProperties(NULL, 0));

  void *device, *pinned;
  OK(cudaMalloc(&device, 1000));
  OK(cudaHostAlloc(&pinned, 1000, 1));
  unsigned flags;
  OK(cudaHostGetFlags(&flags, pinned));
  CHECK(flags == 1);
  memset(attributes, 0xA5, sizeof attributes);
  OK(cudaPointerGetAttributes(attributes, device));
  for (int i = 24; i < 24 + 64; i++) CHECK(attributes[i] == 0xA5);
  CHECK(*(int *)attributes == 2 && *(int *)(attributes + 4) == 0 && *(void **)(attributes + 8) == device && *(void **)(attributes + 16) == NULL);
  OK(cudaPointerGetAttributes(attributes, pinned));
  CHECK(*(int *)attributes == 1 && *(void **)(attributes + 16) == pinned);
  OK(cudaPointerGetAttributes(attributes, &total));
  CHECK(*(int *)attributes == 0);

  int value;
  OK(cudaDeviceGetAttribute(&value, 75, 0));
  CHECK(value == 9);
  EXPECT(1, cudaDeviceGetAttribute(&value, 5000, 0));
  EXPECT(1, cudaDeviceGetAttribute(NULL, 75, 0));

  CHECK(strcmp(cudaGetErrorName(2), "cudaErrorMemoryAllocation") == 0 && strcmp(cudaGetErrorString(2), "out of memory") == 0);
  CHECK(strcmp(cudaGetErrorString(700), "an illegal memory access was encountered") == 0);
  CHECK(strcmp(cudaGetErrorString(12345), "unrecognized error code") == 0);
  const char *name;
  OK(cuGetErrorName(2, &name));
  CHECK(strcmp(name, "CUDA_ERROR_OUT_OF_MEMORY") == 0);
  EXPECT(1, cuGetErrorName(12345, &name));

  /* the last error: set by failures only, read twice, taken once */
  cudaGetLastError();
  EXPECT(101, cudaSetDevice(9));
  OK(cudaFree(NULL));
  EXPECT(101, cudaPeekAtLastError());
  EXPECT(101, cudaGetLastError());
  OK(cudaGetLastError());

  char bus[32];
  OK(cudaDeviceGetPCIBusId(bus, sizeof bus, 1));
  CHECK(strcmp(bus, "0000:02:00.0") == 0);
  EXPECT(1, cudaDeviceGetPCIBusId(bus, 4, 1));
  puts("ok");
}
