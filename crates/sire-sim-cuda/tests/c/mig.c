/* Run with SIRE_SIM_DEVICES=2 and SIRE_SIM_MIG=3: each GPU is three MIG devices. argv[1]: the number of the one that CUDA_VISIBLE_DEVICES names, or "print". */
#include "cuda.h"
int nvmlDeviceGetMigMode(void *, unsigned *, unsigned *), nvmlDeviceGetMaxMigDeviceCount(void *, unsigned *), nvmlDeviceGetMigDeviceHandleByIndex(void *, unsigned, void **);
int nvmlDeviceIsMigDeviceHandle(void *, unsigned *), nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *, void **), nvmlDeviceGetGpuInstanceId(void *, unsigned *);
int cuDeviceGetUuid(unsigned char *, int), cuDeviceGetUuid_v2(unsigned char *, int), nvmlDeviceGetComputeInstanceId(void *, unsigned *);

static void spell(const char *kind, const unsigned char *bytes, char *text) {
  text += sprintf(text, "%s", kind);
  for (int i = 0; i < 16; i++) text += sprintf(text, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", bytes[i]);
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  unsigned gpus, most, current, pending, is_part, id;
  void *gpu[2], *part[6], *same;
  char name[64], text[96], of_part[6][96], of_gpu[2][96], asked[96];
  OK(nvmlInit_v2());
  OK(nvmlDeviceGetCount_v2(&gpus));
  CHECK(gpus == 2);
  for (unsigned i = 0; i < 6; i++) {
    OK(nvmlDeviceGetHandleByIndex_v2(i / 3, &gpu[i / 3]));
    OK(nvmlDeviceGetUUID(gpu[i / 3], of_gpu[i / 3], 96));
    OK(nvmlDeviceGetMigMode(gpu[i / 3], &current, &pending));
    OK(nvmlDeviceGetMaxMigDeviceCount(gpu[i / 3], &most));
    CHECK(current == 1 && pending == 1 && most == 3 && !strncmp(of_gpu[i / 3], "GPU-", 4));
    OK(nvmlDeviceGetMigDeviceHandleByIndex(gpu[i / 3], i % 3, &part[i]));
    OK(nvmlDeviceIsMigDeviceHandle(part[i], &is_part));
    OK(nvmlDeviceGetDeviceHandleFromMigDeviceHandle(part[i], &same));
    OK(nvmlDeviceGetGpuInstanceId(part[i], &id));
    CHECK(is_part == 1 && same == gpu[i / 3] && id == i % 3 + 1);
    OK(nvmlDeviceGetComputeInstanceId(part[i], &id));
    OK(nvmlDeviceGetUUID(part[i], of_part[i], 96));
    OK(nvmlDeviceGetHandleByUUID(of_part[i], &same));
    CHECK(same == part[i] && !strncmp(of_part[i], "MIG-", 4));
    for (unsigned j = 0; j < i; j++) CHECK(strcmp(of_part[i], of_part[j]));
    OK(nvmlDeviceGetName(part[i], name, sizeof name));
    CHECK(strstr(name, "MIG"));
  }
  OK(nvmlDeviceGetName(gpu[0], name, sizeof name));
  OK(nvmlDeviceIsMigDeviceHandle(gpu[0], &is_part));
  CHECK(!strstr(name, "MIG") && is_part == 0);
  EXPECT(6, nvmlDeviceGetMigDeviceHandleByIndex(gpu[0], 3, &same));
  EXPECT(6, nvmlDeviceGetMigDeviceHandleByIndex(part[0], 0, &same));
  EXPECT(2, nvmlDeviceGetDeviceHandleFromMigDeviceHandle(gpu[0], &same));
  EXPECT(2, nvmlDeviceGetGpuInstanceId(gpu[0], &id));
  EXPECT(2, nvmlDeviceGetHandleByIndex_v2(2, &same));
  if (!strcmp(argv[1], "print")) {
    for (int i = 0; i < 6; i++) puts(of_part[i]);
    puts(of_gpu[0]), puts(of_gpu[1]), puts("ok");
    return 0;
  }

  /* CUDA shows one part: the named one, or the first of what is named. */
  int mine = atoi(argv[1]), count;
  unsigned char bytes[16];
  OK(cudaGetDeviceCount(&count));
  CHECK(count == 1);
  OK(cuDeviceGetUuid_v2(bytes, 0));
  spell("MIG-", bytes, asked);
  CHECK(!strcmp(asked, of_part[mine]));
  OK(cuDeviceGetUuid(bytes, 0)); /* the older question: which GPU it is */
  spell("GPU-", bytes, asked);
  CHECK(!strcmp(asked, of_gpu[mine / 3]));
  char bus[32];
  int device = -1;
  OK(cudaDeviceGetPCIBusId(bus, sizeof bus, 0));
  OK(nvmlDeviceGetHandleByPciBusId_v2(bus, &same));
  CHECK(same == gpu[mine / 3]);
  OK(cuDeviceGet(&device, 0));
  CHECK(device == 0);
  void *memory;
  size_t free_bytes, total;
  OK(cudaMemGetInfo(&free_bytes, &total));
  CHECK(free_bytes == total && total == 84 * MIB); /* a third of 256 MiB, in frames of 2 MiB */
  OK(cudaMalloc(&memory, 6 * MIB));
  nvml_memory_t info;
  for (int i = 0; i < 6; i++) {
    OK(nvmlDeviceGetMemoryInfo(part[i], &info));
    CHECK(info.total == total && info.used == (i == mine ? 6 * MIB : 0));
  }
  OK(nvmlDeviceGetMemoryInfo(gpu[mine / 3], &info));
  CHECK(info.total == 3 * total && info.used == 6 * MIB);
  nvml_process_t processes[4];
  unsigned found = 4;
  OK(nvmlDeviceGetComputeRunningProcesses_v3(gpu[mine / 3], &found, processes));
  CHECK(found == 1 && processes[0].used == 6 * MIB);
  OK(nvmlDeviceGetUUID(gpu[0], text, sizeof text));
  puts("ok");
}
