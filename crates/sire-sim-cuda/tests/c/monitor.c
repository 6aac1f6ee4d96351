/* NVML sees the memory of every process of the environment. argv[1] is "hold" in the other process. */
#include "cuda.h"
#include <sys/wait.h>

int main(int argc, char **argv) {
  void *memory, *device, *same;
  OK(cudaMalloc(&memory, 6 * MIB));
  if (argc > 1) { /* hold until the parent closes our input */
    puts("held");
    fflush(stdout);
    return getchar() == EOF ? 0 : 1;
  }
  int in[2], out[2];
  CHECK(pipe(in) == 0 && pipe(out) == 0);
  pid_t child = fork();
  if (child == 0) {
    dup2(in[0], 0), dup2(out[1], 1), close(in[1]), close(out[0]);
    execl("/proc/self/exe", argv[0], "hold", NULL);
    _exit(1);
  }
  close(in[0]);
  char line[8];
  CHECK(read(out[0], line, sizeof line) > 0);

  unsigned count, active;
  OK(nvmlInit_v2());
  OK(nvmlDeviceGetCount_v2(&count));
  CHECK(count == 2);
  OK(nvmlDeviceGetHandleByIndex_v2(0, &device));
  EXPECT(2, nvmlDeviceGetHandleByIndex_v2(2, &same));
  char text[96], bus[32];
  OK(nvmlDeviceGetUUID(device, text, sizeof text));
  OK(nvmlDeviceGetHandleByUUID(text, &same));
  CHECK(same == device && strncmp(text, "GPU-", 4) == 0 && strlen(text) == 40);
  EXPECT(7, nvmlDeviceGetName(device, text, 3));
  OK(cudaDeviceGetPCIBusId(bus, sizeof bus, 0));
  OK(nvmlDeviceGetHandleByPciBusId_v2(bus, &same));
  CHECK(same == device);
  EXPECT(3, nvmlDeviceGetNvLinkState(device, 0, &active));

  nvml_memory_t memory1;
  nvml_memory2_t memory2 = {.version = sizeof(nvml_memory2_t) | 2 << 24};
  OK(nvmlDeviceGetMemoryInfo(device, &memory1));
  OK(nvmlDeviceGetMemoryInfo_v2(device, &memory2));
  CHECK(memory1.used == 12 * MIB && memory1.used + memory1.free == memory1.total && memory2.used == memory1.used);
  memory2.version = 1;
  EXPECT(25, nvmlDeviceGetMemoryInfo_v2(device, &memory2));

  nvml_process_t processes[4];
  nvml_process1_t old[4];
  unsigned few = 1;
  EXPECT(7, nvmlDeviceGetComputeRunningProcesses_v3(device, &few, processes));
  CHECK(few == 2);
  count = 4;
  OK(nvmlDeviceGetComputeRunningProcesses_v3(device, &count, processes));
  CHECK(count == 2 && processes[0].used == 6 * MIB && processes[1].used == 6 * MIB);
  CHECK((processes[0].pid == (unsigned)getpid()) != (processes[1].pid == (unsigned)getpid()));
  count = 4;
  OK(nvmlDeviceGetComputeRunningProcesses(device, &count, old));
  CHECK(count == 2 && old[0].used == 6 * MIB);

  close(in[1]); /* the child leaves, and its memory comes back */
  int status;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  OK(nvmlDeviceGetMemoryInfo(device, &memory1));
  CHECK(memory1.used == 6 * MIB);
  puts("ok");
}
