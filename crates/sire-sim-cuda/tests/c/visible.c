/* Run with SIRE_SIM_DEVICES=3 and CUDA_VISIBLE_DEVICES=2,0: ordinals are the process's, NVML's are not. */
#include "cuda.h"

int main(int argc, char **argv) {
  (void)argv;
  int count, device, attributes[6];
  if (argc > 1) { /* nothing visible */
    EXPECT(100, cudaGetDeviceCount(&count));
    CHECK(count == 0);
    EXPECT(100, cudaFree(NULL));
    puts("ok");
    return 0;
  }
  unsigned all;
  OK(cudaGetDeviceCount(&count));
  CHECK(count == 2);
  OK(nvmlDeviceGetCount_v2(&all));
  CHECK(all == 3);
  void *first, *second;
  OK(cudaMalloc(&first, 2 * MIB));
  OK(cudaGetDevice(&device));
  CHECK(device == 0);
  OK(cudaSetDevice(1));
  OK(cudaMalloc(&second, 4 * MIB));
  OK(cudaGetDevice(&device));
  CHECK(device == 1);
  OK(cudaPointerGetAttributes(attributes, first));
  CHECK(attributes[1] == 0);
  OK(cudaPointerGetAttributes(attributes, second));
  CHECK(attributes[1] == 1);
  EXPECT(101, cudaSetDevice(2));
  char bus[32];
  OK(cudaDeviceGetPCIBusId(bus, sizeof bus, 0));
  CHECK(strcmp(bus, "0000:03:00.0") == 0);
  void *handle;
  nvml_memory_t memory;
  unsigned long long expected[3] = {4 * MIB, 0, 2 * MIB};
  for (unsigned i = 0; i < 3; i++) {
    OK(nvmlDeviceGetHandleByIndex_v2(i, &handle));
    OK(nvmlDeviceGetMemoryInfo(handle, &memory));
    CHECK(memory.used == expected[i]);
  }
  puts("ok");
}
