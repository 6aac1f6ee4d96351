/* Memory and events for other processes by the legacy handles, runtime and driver level. The program runs itself as the other process. */
#include "cuda.h"
#include <sys/wait.h>

typedef struct { unsigned char bytes[64]; } handle_t;
int cudaIpcOpenMemHandle(void **, handle_t, unsigned), cudaIpcCloseMemHandle(void *), cudaIpcGetEventHandle(handle_t *, event_t), cudaIpcOpenEventHandle(event_t *, handle_t);
int cuIpcGetMemHandle(handle_t *, ptr_t), cuIpcOpenMemHandle_v2(ptr_t *, handle_t, unsigned), cuIpcCloseMemHandle(ptr_t), cuIpcGetEventHandle(handle_t *, event_t), cuIpcOpenEventHandle(event_t *, handle_t);
int cudaMemPoolCreate(void **, const void *), cudaMallocFromPoolAsync(void **, size_t, void *, stream_t);

static void to_hex(const handle_t *handle, char *text) {
  for (int i = 0; i < 64; i++) sprintf(text + 2 * i, "%02x", handle->bytes[i]);
}

static handle_t from_hex(const char *text) {
  handle_t handle;
  for (int i = 0; i < 64; i++) {
    unsigned byte;
    CHECK(sscanf(text + 2 * i, "%2x", &byte) == 1);
    handle.bytes[i] = (unsigned char)byte;
  }
  return handle;
}

/* The other process: finds 1s in the memory, leaves 2s; on another device than the memory's. */
static int child(int device, const char *memory, const char *event_text) {
  static unsigned char host[MIB];
  handle_t handle = from_hex(memory), none = {{0}};
  unsigned char *opened = NULL, *again = NULL;
  ptr_t third = 0;
  event_t event, same;
  OK(cudaSetDevice(device));
  OK(cudaMemset(NULL, 0, 0));
  EXPECT(1, cudaIpcOpenMemHandle((void **)&opened, handle, 0));
  EXPECT(1, cudaIpcOpenMemHandle(NULL, handle, 1));
  EXPECT(400, cudaIpcOpenMemHandle((void **)&opened, none, 1));
  EXPECT(400, cudaIpcOpenEventHandle(&event, handle));
  CHECK(opened == NULL);
  OK(cudaIpcOpenMemHandle((void **)&opened, handle, 1));
  OK(cuIpcOpenMemHandle_v2(&third, handle, 1));
  OK(cudaIpcOpenMemHandle((void **)&again, handle, 1));
  CHECK(opened == again && (ptr_t)opened == third);
  OK(cuIpcCloseMemHandle(third));
  OK(cudaIpcCloseMemHandle(again));
  /* A fill is not over when the call returns: who reads elsewhere waits for the event behind it. */
  OK(cudaIpcOpenEventHandle(&event, from_hex(event_text)));
  OK(cuIpcOpenEventHandle(&same, from_hex(event_text)));
  OK(cudaEventSynchronize(event));
  OK(cudaMemcpy(host, opened, MIB, 2));
  for (size_t i = 0; i < MIB; i++) CHECK(host[i] == 1);
  struct { int type, device; void *device_pointer, *host_pointer; char reserved[64]; } attributes;
  OK(cudaPointerGetAttributes(&attributes, opened + 5));
  CHECK(attributes.type == 2 && attributes.device == 0);
  ptr_t base;
  size_t size;
  OK(cuMemGetAddressRange_v2(&base, &size, (ptr_t)opened + 5));
  CHECK(base == (ptr_t)opened && size == MIB);
  int capable = 7;
  OK(cuPointerGetAttribute(&capable, 10, (ptr_t)opened));
  CHECK(capable == 0);
  EXPECT(1, cudaIpcGetMemHandle(&none, opened));
  EXPECT(1, cudaFree(opened));
  cudaGetLastError();
  OK(cudaMemset(opened, 2, MIB)); /* by this process's own device */
  OK(cudaDeviceSynchronize());
  OK(cudaEventQuery(same));
  EXPECT(400, cudaIpcGetEventHandle(&none, event));
  OK(cudaEventRecord(event, NULL));
  OK(cudaStreamWaitEvent(NULL, same, 0));
  OK(cudaDeviceSynchronize());
  OK(cudaEventDestroy(event));
  OK(cudaEventDestroy(same));
  OK(cudaIpcCloseMemHandle(opened));
  EXPECT(1, cudaIpcCloseMemHandle(opened));
  EXPECT(1, cuIpcCloseMemHandle((ptr_t)opened));
  return 0;
}

static int run(const char *program, const char *device, const handle_t *memory, const handle_t *event) {
  char memory_text[130], event_text[130], command[600];
  to_hex(memory, memory_text), to_hex(event, event_text);
  snprintf(command, sizeof command, "exec '%s' child %s %s %s", program, device, memory_text, event_text);
  int status = system(command);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int main(int argc, char **argv) {
  alarm(100);
  if (argc == 5) return child(atoi(argv[2]), argv[3], argv[4]);
  static unsigned char host[MIB];
  unsigned char *before, *shared;
  OK(cudaMalloc((void **)&before, 512));
  OK(cudaMalloc((void **)&shared, MIB));
  handle_t handle, same, event_handle;
  OK(cudaIpcGetMemHandle(&handle, shared));
  OK(cuIpcGetMemHandle(&same, (ptr_t)shared + 999));
  CHECK(memcmp(&handle, &same, sizeof handle) == 0); /* the allocation's, from wherever in it */
  int capable = 7;
  OK(cuPointerGetAttribute(&capable, 10, (ptr_t)shared));
  CHECK(capable == 1);

  /* What has no such handle. */
  void *pinned, *pooled;
  ptr_t va, physical;
  prop_t prop = device_memory(0);
  access_t access = {.location = {1, 0}, .flags = 3};
  OK(cudaHostAlloc(&pinned, 4096, 0));
  OK(cudaMallocAsync(&pooled, 4 * MIB, NULL));
  OK(cuMemAddressReserve(&va, 2 * MIB, 0, 0, 0));
  OK(cuMemCreate(&physical, 2 * MIB, &prop, 0));
  OK(cuMemMap(va, 2 * MIB, 0, physical, 0));
  OK(cuMemSetAccess(va, 2 * MIB, &access, 1));
  EXPECT(1, cudaIpcGetMemHandle(&same, pinned));
  EXPECT(1, cudaIpcGetMemHandle(&same, pooled));
  EXPECT(1, cuIpcGetMemHandle(&same, va));
  EXPECT(1, cudaIpcGetMemHandle(&same, NULL));
  EXPECT(1, cudaIpcGetMemHandle(NULL, shared));
  CHECK(memcmp(&handle, &same, sizeof handle) == 0);
  OK(cuPointerGetAttribute(&capable, 10, va));
  CHECK(capable == 0);
  void *opened = NULL;
  EXPECT(201, cudaIpcOpenMemHandle(&opened, handle, 1)); /* it is this process's own */
  EXPECT(1, cudaIpcCloseMemHandle(shared));

  event_t event, plain;
  EXPECT(1, cudaEventCreateWithFlags(&event, 4)); /* interprocess, with timing */
  OK(cudaEventCreateWithFlags(&event, 4 | 2));
  OK(cudaEventCreateWithFlags(&plain, 2));
  EXPECT(400, cudaIpcGetEventHandle(&event_handle, plain));
  OK(cudaIpcGetEventHandle(&event_handle, event));
  OK(cuIpcGetEventHandle(&same, event));
  CHECK(memcmp(&event_handle, &same, sizeof same) == 0);
  EXPECT(201, cudaIpcOpenEventHandle(&plain, event_handle));
  cudaGetLastError();
  OK(cudaEventQuery(event));

  const char *devices[] = {"0", "1"};
  for (int i = 0; i < 2; i++) {
    OK(cudaMemset(shared, 1, MIB));
    OK(cudaEventRecord(event, NULL));
    CHECK(run(argv[0], devices[i], &handle, &event_handle) == 0);
    OK(cudaEventSynchronize(event)); /* recorded last by the other process, which is gone */
    OK(cudaMemcpy(host, shared, MIB, 2));
    for (size_t at = 0; at < MIB; at++) CHECK(host[at] == 2);
  }
  OK(cudaEventDestroy(event));
  OK(cudaEventDestroy(plain));
  OK(cudaFree(shared));
  OK(cudaFree(before));
  OK(cudaFree(pooled));
  OK(cudaDeviceSynchronize());
  OK(cuMemUnmap(va, 2 * MIB));
  OK(cuMemRelease(physical));
  CHECK(sire_sim_used(0) == 0);
  puts("ok");
  return 0;
}
