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
  EXPECT(500, cuGetProcAddress_v2("cudaMalloc", &function, 12000, 0, &status));
  EXPECT(1, cudaGetDriverEntryPointByVersion(NULL, &function, 12000, 0, &status));
  OK(cudaGetDriverEntryPointByVersion("cuMemGetInfo", &function, 12000, 0, NULL));
  CHECK(function == (void *)cuMemGetInfo_v2);
  puts("ok");
}
