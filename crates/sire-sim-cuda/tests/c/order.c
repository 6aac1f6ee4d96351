/* Streams and events: order, queries, times; run with SIRE_SIM_DELAY_US so that missing waits would show. */
#include "cuda.h"

static void note(void *data) { *(volatile int *)data += 1; }

/* Holds a stream until it is opened, however long this thread is kept from running. */
static void gate(void *open) {
  while (!*(volatile int *)open) usleep(1000);
}

int main(void) {
  stream_t first, second;
  event_t done, start;
  volatile int calls = 0, open = 0;
  unsigned char *memory, *host;
  OK(cudaStreamCreateWithFlags(&first, 1));
  OK(cudaStreamCreateWithFlags(&second, 1));
  OK(cudaEventCreateWithFlags(&start, 0));
  OK(cudaEventCreateWithFlags(&done, 0));
  OK(cudaMalloc((void **)&memory, MIB));
  OK(cudaHostAlloc((void **)&host, MIB, 0));
  OK(cudaEventQuery(done)); /* never recorded counts as passed */
  OK(cudaEventRecord(start, first));
  OK(cudaMemsetAsync(memory, 4, MIB, first));
  OK(cudaLaunchHostFunc(first, gate, (void *)&open));
  OK(cudaLaunchHostFunc(first, note, (void *)&calls));
  OK(cudaEventRecord(done, first));
  EXPECT(600, cudaStreamQuery(first));
  EXPECT(600, cudaEventQuery(done));
  EXPECT(600, cudaGetLastError());
  OK(cudaStreamQuery(second));
  open = 1;
  OK(cudaStreamWaitEvent(second, done, 0));
  OK(cudaMemcpyAsync(host, memory, MIB, 2, second));
  OK(cudaStreamSynchronize(second));
  CHECK(host[0] == 4 && host[MIB - 1] == 4 && calls == 1);
  OK(cudaEventSynchronize(done));
  float milliseconds;
  OK(cudaEventElapsedTime(&milliseconds, start, done));
  CHECK(milliseconds >= 20);
  OK(cudaEventDestroy(done));
  EXPECT(400, cudaEventDestroy(done));
  OK(cudaStreamDestroy(second));
  EXPECT(400, cudaStreamSynchronize(second));
  EXPECT(400, cudaStreamDestroy(NULL));
  puts("ok");
}
