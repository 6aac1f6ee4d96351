/* Virtual time, read by the program; argv[1] is the profile's name, or nothing if there is none. */
#include "cuda.h"

double sire_sim_now(void);
int sire_sim_profile(char *, size_t, size_t *);

static int without(void) {
  char name[8] = "?";
  CHECK(sire_sim_now() == -1.0);
  OK(sire_sim_profile(name, sizeof name, NULL));
  CHECK(name[0] == 0);
  return puts("ok") < 0;
}

int main(int argc, char **argv) {
  if (argc < 2) return without();
  const size_t bytes = 64 * MIB;
  const double in = bytes / 55.6e9, out = bytes / 53.0e9;
  stream_t stream;
  event_t start, middle, end;
  unsigned char *memory, *host;
  char name[64];
  float there, back;
  OK(sire_sim_profile(name, sizeof name, NULL));
  CHECK(strcmp(name, argv[1]) == 0);
  OK(cudaStreamCreateWithFlags(&stream, 1));
  OK(cudaEventCreateWithFlags(&start, 0));
  OK(cudaEventCreateWithFlags(&middle, 0));
  OK(cudaEventCreateWithFlags(&end, 0));
  OK(cudaMalloc((void **)&memory, bytes));
  OK(cudaHostAlloc((void **)&host, bytes, 0));
  memset(host, 7, bytes);
  double before = sire_sim_now();
  OK(cudaEventRecord(start, stream));
  OK(cudaMemcpyAsync(memory, host, bytes, 1, stream));
  OK(cudaEventRecord(middle, stream));
  OK(cudaMemcpyAsync(host, memory, bytes, 2, stream));
  OK(cudaEventRecord(end, stream));
  CHECK(sire_sim_now() - before < 10e-6); /* the host has only submitted */
  OK(cudaEventSynchronize(end));
  double took = sire_sim_now() - before;
  CHECK(took > in + out && took < in + out + 20e-6);
  OK(cudaEventElapsedTime(&there, start, middle));
  OK(cudaEventElapsedTime(&back, middle, end));
  CHECK(there * 1e-3 > in && there * 1e-3 < in + 5e-6);
  CHECK(back * 1e-3 > out && back * 1e-3 < out + 5e-6);
  CHECK(host[0] == 7 && host[bytes - 1] == 7); /* the bytes are as real as ever */
  usleep(20000);
  CHECK(sire_sim_now() - before == took); /* and the wall clock means nothing */
  puts("ok");
}
