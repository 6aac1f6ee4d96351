/* What belongs to one device is refused by another, with CUDA's number: an event on a stream, times between events, a kernel on a stream. */
#include "cuda.h"

#define FILL "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EELb0EEEviT0_T1_"
static char fill;

int main(void) {
  __cudaRegisterFunction(__cudaRegisterFatBinary(NULL), &fill, NULL, FILL, -1, 0, 0, 0, 0, 0);
  stream_t streams[2];
  event_t events[2];
  float *memory, milliseconds, value = 1, back = 0;
  dim3_t one = {1, 1, 1};
  for (int device = 0; device < 2; device++) {
    OK(cudaSetDevice(device));
    OK(cudaStreamCreateWithFlags(&streams[device], 1));
    OK(cudaEventCreateWithFlags(&events[device], 0));
  }
  OK(cudaMalloc((void **)&memory, sizeof *memory));
  /* The second device is current. What is refused leaves the event as it was. */
  EXPECT(400, cudaEventRecord(events[0], streams[1]));
  EXPECT(400, cudaEventRecord(events[0], NULL));
  EXPECT(400, cudaEventRecord(events[1], streams[0]));
  OK(cudaEventRecord(events[0], streams[0]));
  OK(cudaEventRecord(events[1], NULL));
  /* Streams wait for events of any device. */
  OK(cudaStreamWaitEvent(streams[1], events[0], 0));
  OK(cudaEventSynchronize(events[0]));
  OK(cudaEventSynchronize(events[1]));
  EXPECT(400, cudaEventElapsedTime(&milliseconds, events[0], events[1]));
  int n = 1;
  void *arguments[] = {&n, &value, &memory};
  EXPECT(400, cudaLaunchKernel(&fill, one, one, arguments, 0, streams[0]));
  OK(cudaLaunchKernel(&fill, one, one, arguments, 0, streams[1]));
  /* Copies may be put on streams of any device. */
  OK(cudaStreamSynchronize(streams[1]));
  OK(cudaMemcpyAsync(&back, memory, sizeof back, 2, streams[0]));
  OK(cudaStreamSynchronize(streams[0]));
  CHECK(back == 1);
  puts("ok");
}
