/* A device operation on memory that is not mapped loses the context: error 700 from then on. */
#include "cuda.h"

int main(void) {
  ptr_t va;
  void *other;
  char host[64];
  OK(cudaFree(NULL));
  OK(cuMemAddressReserve(&va, 2 * MIB, 0, 0, 0));
  stream_t stream;
  OK(cudaStreamCreateWithFlags(&stream, 1));
  OK(cudaMalloc(&other, 64));
  OK(sire_sim_check(other, 64, 0, 1));
  int status = cudaMemsetAsync((void *)va, 1, 64, stream);
  if (status == 0) status = cudaStreamSynchronize(stream);
  CHECK(status == 700);
  EXPECT(700, cudaMemcpy(host, other, 64, 2));
  EXPECT(700, cudaMalloc(&other, 64));
  EXPECT(700, cudaGetLastError());
  EXPECT(700, cudaGetLastError()); /* taking it does not help */
  EXPECT(700, cudaDeviceSynchronize());
  puts("ok");
}
