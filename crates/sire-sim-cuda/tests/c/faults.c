/* argv[1] says which plan the environment carries. */
#include "cuda.h"

int main(int argc, char **argv) {
  void *a, *b;
  CHECK(argc == 2);
  if (strcmp(argv[1], "environment") == 0) { /* cudaMalloc#2=error:2; cudaMemset=error:719 */
    OK(cudaMalloc(&a, 64));
    EXPECT(2, cudaMalloc(&b, 64));
    EXPECT(2, cudaGetLastError());
    OK(cudaMalloc(&b, 64));
    EXPECT(719, cudaMemset(b, 0, 64));
    OK(sire_sim_fault(""));
    OK(cudaMemset(b, 0, 64));
    OK(sire_sim_fault("cuMemCreate#1=error:2; nvmlInit_v2=error:801"));
    prop_t prop = device_memory(0);
    ptr_t handle;
    EXPECT(2, cuMemCreate(&handle, 2 * MIB, &prop, 0));
    OK(cuMemCreate(&handle, 2 * MIB, &prop, 0));
    OK(cuMemRelease(handle));
    EXPECT(3, nvmlInit_v2());
    EXPECT(1, sire_sim_fault("nonsense here"));
    char counts[65536];
    size_t length;
    OK(sire_sim_counters(counts, sizeof counts, &length));
    CHECK(length == strlen(counts) && strstr(counts, "\"cuMemCreate\": 2") != NULL); /* since the plan was set */
  } else if (strcmp(argv[1], "kill") == 0) { /* cudaFree#2=kill */
    OK(cudaFree(NULL));
    cudaFree(NULL);
    FAIL("still alive");
  } else if (strcmp(argv[1], "bytes") == 0) { /* cudaMalloc+4MiB=error:2 */
    OK(cudaMalloc(&a, 3 * MIB));
    EXPECT(2, cudaMalloc(&b, 3 * MIB));
  }
  puts("ok");
}
