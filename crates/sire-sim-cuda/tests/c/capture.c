/* Capture, replay, what capture prohibits, and the objects that graphs keep. */
#include "cuda.h"

static int destroyed;
static void destroy(void *data) { destroyed += *(int *)data; }
static void count(void *data) { ++*(int *)data; }

static void prohibited(stream_t stream) {
  graph_t graph;
  void *memory, *pinned;
  int status, relaxed = 2;
  OK(cudaStreamBeginCapture(stream, 0));
  EXPECT(900, cudaMalloc(&memory, 64));
  OK(cudaStreamIsCapturing(stream, &status));
  CHECK(status == 2);
  EXPECT(901, cudaStreamEndCapture(stream, &graph));
  CHECK(graph == NULL);
  cudaGetLastError();

  OK(cudaStreamBeginCapture(stream, 0));
  EXPECT(900, cudaStreamSynchronize(stream));
  EXPECT(901, cudaStreamEndCapture(stream, &graph));

  OK(cudaStreamBeginCapture(stream, 0));
  EXPECT(900, cudaDeviceSynchronize());
  EXPECT(901, cudaStreamEndCapture(stream, &graph));

  OK(cudaStreamBeginCapture(stream, 0));
  OK(cudaThreadExchangeStreamCaptureMode(&relaxed));
  CHECK(relaxed == 0);
  OK(cudaMalloc(&memory, 64));
  OK(cudaHostAlloc(&pinned, 64, 0));
  OK(cudaThreadExchangeStreamCaptureMode(&relaxed));
  CHECK(relaxed == 2);
  OK(cudaStreamEndCapture(stream, &graph));
  OK(cudaGraphDestroy(graph));
  OK(cudaFree(memory));
  OK(cudaFreeHost(pinned));
  EXPECT(901, cudaStreamEndCapture(stream, &graph) ? 901 : 0);
  cudaGetLastError();
}

int main(void) {
  stream_t stream;
  OK(cudaStreamCreateWithFlags(&stream, 1));
  unsigned char *from, *to, back[64];
  OK(cudaMalloc((void **)&from, 64));
  OK(cudaMalloc((void **)&to, 64));
  OK(cudaMemset(from, 1, 64));
  OK(cudaMemset(to, 0, 64));

  graph_t graph, building;
  exec_t exec;
  int status, calls = 0, weight = 5;
  unsigned long long id = 0;
  const void **dependencies;
  size_t dependency_count, node_count = 0;
  OK(cudaStreamBeginCapture(stream, 0));
  OK(cudaMemcpyAsync(to, from, 32, 3, stream));
  OK(cudaMemsetAsync(to + 32, 9, 32, stream));
  OK(cudaLaunchHostFunc(stream, count, &calls));
  OK(cudaStreamGetCaptureInfo(stream, &status, &id, &building, &dependencies, NULL, &dependency_count));
  CHECK(status == 1 && id != 0 && building != NULL && dependency_count == 1 && dependencies[0] != NULL);
  void *object;
  OK(cudaUserObjectCreate(&object, &weight, destroy, 1, 1));
  OK(cudaGraphRetainUserObject(building, object, 1, 1));
  OK(cudaStreamEndCapture(stream, &graph));
  CHECK(graph == building && calls == 0);
  void *nodes[8];
  OK(cudaGraphGetNodes(graph, NULL, &node_count));
  CHECK(node_count == 3);
  OK(cudaGraphGetNodes(graph, nodes, &node_count));
  size_t before = 8;
  OK(cudaGraphNodeGetDependencies(nodes[2], NULL, NULL, &before));
  CHECK(before == 1);
  OK(cudaGraphInstantiate(&exec, graph, 0));
  OK(cudaGraphDestroy(graph));
  CHECK(destroyed == 0);
  OK(cudaMemset(from, 77, 64));
  OK(cudaDeviceSynchronize());
  OK(cudaGraphLaunch(exec, stream));
  OK(cudaGraphLaunch(exec, stream));
  OK(cudaStreamSynchronize(stream));
  OK(cudaMemcpy(back, to, 64, 2));
  CHECK(back[0] == 77 && back[31] == 77 && back[32] == 9 && calls == 2);
  OK(cudaGraphExecDestroy(exec));
  CHECK(destroyed == 5);

  prohibited(stream);
  OK(cudaStreamDestroy(stream));
  puts("ok");
}
