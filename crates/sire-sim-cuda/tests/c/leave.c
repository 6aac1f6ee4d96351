/* What is left at exit shows in the census; destructors that call afterwards, and forked children, are refused kindly. */
#include "cuda.h"
#include <sys/wait.h>

static void *kept;
/* Registered before the device is first used, so run after its end, as PyTorch's static destructors may be. */
static void late(void) { fprintf(stderr, "late %d\n", cudaFree(kept)); }

int main(void) {
  atexit(late);
  prop_t prop = device_memory(0);
  ptr_t handle;
  OK(cudaMalloc(&kept, 4 * MIB));
  OK(sire_sim_set_tag("weights"));
  OK(cuMemCreate(&handle, 2 * MIB, &prop, 0));
  OK(sire_sim_set_tag(NULL));
  char census[65536], path[256];
  size_t length;
  OK(sire_sim_census(census, sizeof census, &length));
  CHECK(length < sizeof census && strstr(census, "\"label\":\"weights\"") != NULL);
  OK(sire_sim_census(NULL, 0, &length));
  CHECK(length == strlen(census));
  OK(sire_sim_memfd(0, path, sizeof path));
  CHECK(access(path, R_OK) == 0);
  EXPECT(1, sire_sim_memfd(0, path, 3));
  pid_t child = fork();
  if (child == 0) {
    int count;
    _exit(cudaGetDeviceCount(&count) == 3 && cudaFree(kept) == 3 ? 0 : 1);
  }
  int status;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  child = fork();
  if (child == 0) exit(0); /* its atexit must not take the parent's memory away */
  waitpid(child, &status, 0);
  CHECK(sire_sim_used(0) == 6 * MIB);
  puts("ok");
}
