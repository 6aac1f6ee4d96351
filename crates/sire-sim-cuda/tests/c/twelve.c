/* CUDA 12 where 13 is otherwise: structs, arguments, versions. The runtime is found as libcudart.so.12 here. */
#define CUDA12
#include "cuda.h"

static void structs(void) {
  unsigned char prop[1032 + 64];
  memset(prop, 0xA5, sizeof prop);
  OK(cudaGetDeviceProperties_v2(prop, 0));
  for (int i = 1032; i < 1032 + 64; i++) CHECK(prop[i] == 0xA5);
  CHECK(strcmp((char *)prop, "Sire software device") == 0 && *(size_t *)(prop + 288) == 256 * MIB);
  CHECK(*(int *)(prop + 348) == 1755000 && *(int *)(prop + 360) == 9 && *(int *)(prop + 384) == 1 && *(int *)(prop + 388) == 16);
  CHECK(*(int *)(prop + 584) == 1 && *(int *)(prop + 608) == 2619000 && *(int *)(prop + 624) == 2048 && *(size_t *)(prop + 640) == 233472);
  CHECK(*(size_t *)(prop + 696) == 232448 && *(size_t *)(prop + 720) == 1024 && *(int *)(prop + 744) == 1);
  for (int i = 780; i < 1032; i++) CHECK(prop[i] == 0);
  /* the plain name has CUDA 11's struct, with which CUDA 12's begins */
  unsigned char old[728 + 64];
  memset(old, 0xA5, sizeof old);
  OK(cudaGetDeviceProperties(old, 0));
  CHECK(memcmp(old, prop, 728) == 0);
  for (int i = 728; i < 728 + 64; i++) CHECK(old[i] == 0xA5);
  EXPECT(101, cudaGetDeviceProperties_v2(prop, 2));
  EXPECT(1, cudaGetDeviceProperties_v2(NULL, 0));
  cudaGetLastError();
}

static void versions(void) {
  int version, status;
  void *function;
  OK(cudaRuntimeGetVersion(&version));
  CHECK(version == 12080);
  OK(cudaDriverGetVersion(&version)); /* drivers serve older runtimes */
  CHECK(version == 13020);
  OK(cudaGetDriverEntryPoint("cuStreamGetCaptureInfo", &function, 0, &status));
  CHECK(status == 0 && function == (void *)cuStreamGetCaptureInfo_v3);
  OK(cudaGetDriverEntryPoint("cuGetProcAddress", &function, 0, &status));
  CHECK(status == 0 && function == (void *)cuGetProcAddress_v2);
  OK(cudaGetDriverEntryPoint("cuNoSuchThing", &function, 0, &status));
  CHECK(function == NULL && status == 1);
}

static void capture(stream_t stream) {
  unsigned char *memory;
  OK(cudaMalloc((void **)&memory, 64));
  graph_t graph, building = NULL;
  int status, queried;
  unsigned long long id = 0, again = 0;
  const void **dependencies = NULL, *edges = &status;
  size_t count = 9;
  OK(cudaStreamGetCaptureInfo(stream, &status, &id));
  CHECK(status == 0);
  OK(cudaStreamBeginCapture(stream, 0));
  OK(cudaMemsetAsync(memory, 1, 32, stream));
  OK(cudaMemsetAsync(memory, 2, 32, stream));
  OK(cudaMemsetAsync(memory, 3, 32, stream));
  OK(cudaStreamGetCaptureInfo(stream, &status, &id));
  CHECK(status == 1 && id != 0);
  OK(cudaStreamGetCaptureInfo_v2(stream, &queried, &again, &building, &dependencies, &count));
  CHECK(queried == 1 && again == id && building != NULL && count == 1 && dependencies[0] != NULL);
  OK(cudaStreamGetCaptureInfo_v3(stream, &queried, &again, NULL, NULL, &edges, &count));
  CHECK(again == id && edges == NULL && count == 1);
  OK(cudaStreamEndCapture(stream, &graph));
  CHECK(graph == building);

  void *nodes[3], *from[3], *to[3], *neighbour[2];
  unsigned char data[2][8];
  OK(cudaGraphGetNodes(graph, NULL, &count));
  CHECK(count == 3);
  OK(cudaGraphGetNodes(graph, nodes, &count));
  OK(cudaGraphGetEdges(graph, NULL, NULL, &count));
  CHECK(count == 2);
  count = 3;
  OK(cudaGraphGetEdges(graph, from, to, &count));
  CHECK(count == 2 && from[0] == nodes[0] && to[0] == nodes[1] && from[1] == nodes[1] && to[1] == nodes[2]);
  EXPECT(1, cudaGraphGetEdges(graph, from, NULL, &count));
  memset(data, 0xA5, sizeof data);
  count = 1;
  OK(cudaGraphGetEdges_v2(graph, from, to, data, &count));
  for (int i = 0; i < 8; i++) CHECK(data[0][i] == 0 && data[1][i] == 0xA5);
  count = 2;
  OK(cudaGraphNodeGetDependencies(nodes[1], neighbour, &count));
  CHECK(count == 1 && neighbour[0] == nodes[0]);
  count = 2;
  OK(cudaGraphNodeGetDependentNodes(nodes[1], neighbour, &count));
  CHECK(count == 1 && neighbour[0] == nodes[2]);
  OK(cudaGraphNodeGetDependencies_v2(nodes[0], NULL, NULL, &count));
  CHECK(count == 0);
  OK(cudaGraphDestroy(graph));
  OK(cudaFree(memory));
}

static void managed(stream_t stream) {
  void *memory;
  OK(cudaMallocManaged(&memory, MIB, 1));
  OK(cudaMemPrefetchAsync(memory, MIB, 1, stream));
  OK(cudaMemPrefetchAsync(memory, MIB, -1, stream));
  EXPECT(101, cudaMemPrefetchAsync(memory, MIB, 2, stream));
  OK(cudaMemPrefetchAsync_v2(memory, MIB, (location_t){1, 1}, 0, stream));
  OK(cudaMemPrefetchAsync_v2(memory, MIB, (location_t){2, 0}, 0, stream));
  EXPECT(101, cudaMemPrefetchAsync_v2(memory, MIB, (location_t){1, 2}, 0, stream));
  EXPECT(1, cudaMemPrefetchAsync_v2(memory, MIB, (location_t){7, 0}, 0, stream));
  OK(cudaMemAdvise(memory, MIB, 3, -1));
  OK(cudaMemAdvise(memory, MIB, 1, 77)); /* read mostly: the device does not count */
  EXPECT(101, cudaMemAdvise(memory, MIB, 5, 2));
  EXPECT(1, cudaMemAdvise(memory, MIB, 9, 0));
  OK(cudaMemAdvise_v2(memory, MIB, 5, (location_t){1, 1}));
  OK(cudaFree(memory));
  cudaGetLastError();
}

int main(void) {
  stream_t stream;
  event_t start, end;
  float milliseconds = -1;
  structs();
  versions();
  OK(cudaStreamCreateWithFlags(&stream, 1));
  capture(stream);
  managed(stream);
  OK(cudaEventCreateWithFlags(&start, 0));
  OK(cudaEventCreateWithFlags(&end, 0));
  OK(cudaEventRecord(start, stream));
  OK(cudaEventRecord(end, stream));
  OK(cudaStreamSynchronize(stream));
  OK(cudaEventElapsedTime_v2(&milliseconds, start, end));
  CHECK(milliseconds >= 0);
  puts("ok");
}
