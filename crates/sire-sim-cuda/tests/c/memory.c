/* Heap, pinned and managed memory, copies in every direction, two devices, out of memory, pools. */
#include "cuda.h"

int cudaGraphAddNode(void); /* not simulated */

static void peers(void) {
  void *here, *there;
  int can;
  char text[6] = "peers", back[6];
  OK(cudaMalloc(&here, 4096));
  OK(cudaSetDevice(1));
  OK(cudaMalloc(&there, 4096));
  OK(cudaSetDevice(0));
  OK(cudaDeviceCanAccessPeer(&can, 0, 1));
  CHECK(can == 1);
  OK(cudaDeviceCanAccessPeer(&can, 0, 0));
  CHECK(can == 0);
  OK(cudaMemcpy(here, text, 6, 1));
  OK(cudaMemcpyPeer(there, 1, here, 0, 6));
  OK(cudaDeviceEnablePeerAccess(1, 0));
  EXPECT(704, cudaDeviceEnablePeerAccess(1, 0));
  OK(cudaMemcpy(back, there, 6, 2));
  CHECK(memcmp(text, back, 6) == 0);
  OK(cudaFree(here));
  OK(cudaFree(there));
}

/* The driver's names for the same pools; per-thread variants; rows with a pitch. */
static void driver_pools(void *runtimes) {
  void *pool, *own, *found;
  struct { int kind, handle_types; location_t location; uint64_t rest[9]; } props = {.kind = 1, .location = {1, 1}};
  ptr_t block, rows;
  uint64_t used;
  size_t pitch;
  OK(cuDeviceGetDefaultMemPool(&pool, 0));
  CHECK(pool == runtimes);
  OK(cuMemPoolCreate(&own, &props));
  OK(cuMemAllocFromPoolAsync(&block, MIB, own, NULL));
  OK(cuMemPoolGetAttribute(own, 7, &used));
  CHECK(used == MIB && sire_sim_used(1) >= MIB);
  OK(cuMemFreeAsync_ptsz(block, NULL));
  OK(cuMemPoolGetAttribute(own, 7, &used));
  CHECK(used == 0);
  OK(cuMemPoolDestroy(own));
  EXPECT(400, cuMemPoolDestroy(own));
  OK(cuMemAllocPitch_v2(&rows, &pitch, 700, 3, 4));
  CHECK(pitch == 1024);
  OK(cuMemFree_v2(rows));
  EXPECT(1, cuMemAllocPitch_v2(&rows, &pitch, 700, 3, 5));
  OK(cuGetProcAddress_v2("cuMemFreeAsync", &found, 12000, 2, NULL));
  CHECK(found == (void *)cuMemFreeAsync_ptsz);
  OK(cuGetProcAddress_v2("cuMemFree", &found, 12000, 2, NULL));
  CHECK(found == (void *)cuMemFree_v2);
}

int main(void) {
  size_t free0, free1, total;
  OK(cudaFree(NULL));
  OK(cudaMemGetInfo(&free0, &total));
  void *a, *b, *host, *managed;
  OK(cudaMalloc(&a, 8 * MIB));
  OK(cudaMalloc(&b, 8 * MIB));
  OK(cudaMemGetInfo(&free1, &total));
  CHECK(free0 - free1 == 16 * MIB && sire_sim_used(0) == total - free1);
  OK(cudaMalloc(&managed, 0));
  CHECK(managed == NULL);
  OK(cudaHostAlloc(&host, 8 * MIB, 0));
  for (size_t i = 0; i < 8 * MIB; i++) ((unsigned char *)host)[i] = i * 7;
  OK(cudaMemcpyAsync(a, host, 8 * MIB, 1, NULL));
  OK(cudaMemcpyAsync(b, a, 8 * MIB, 3, NULL));
  memset(host, 0, 1); /* pinned: undefined on a GPU, so wait before looking */
  OK(cudaDeviceSynchronize());
  unsigned char *back = malloc(8 * MIB);
  OK(cudaMemcpy(back, b, 8 * MIB, 4));
  for (size_t i = 4096; i < 8 * MIB; i++) CHECK(back[i] == (unsigned char)(i * 7));
  OK(cudaMemset(b, 0x5A, 4096));
  OK(cudaMemcpy(back, b, 8192, 2));
  CHECK(back[0] == 0x5A && back[4095] == 0x5A && back[4097] == (unsigned char)(4097 * 7));
  OK(cudaMemcpy2D(b, 64, back, 32, 16, 4, 1));
  OK(cudaMallocManaged(&managed, 4096, 1));
  memset(managed, 3, 4096);
  OK(cudaMemcpy(a, managed, 4096, 4));
  OK(cudaMemcpy(back, a, 16, 2));
  CHECK(back[15] == 3);
  EXPECT(21, cudaMemcpy(a, b, 16, 9));
  OK(cudaHostRegister(back, 8 * MIB, 0));
  EXPECT(712, cudaHostRegister(back, 8 * MIB, 0));
  OK(cudaHostUnregister(back));
  EXPECT(713, cudaHostUnregister(back));

  void *big = &big, *kept = big;
  EXPECT(2, cudaMalloc(&big, (size_t)1 << 40));
  EXPECT(2, cudaGetLastError());
  OK(cudaGetLastError());
  (void)kept;
  OK(cudaFree(a));
  EXPECT(1, cudaFree(a));
  EXPECT(1, cudaFree((char *)b + 8));
  EXPECT(1, cudaMalloc(NULL, 16));

  void *pool, *block;
  uint64_t used;
  OK(cudaDeviceGetDefaultMemPool(&pool, 0));
  OK(cudaMallocAsync(&block, MIB, NULL));
  OK(cudaMemPoolGetAttribute(pool, 7, &used));
  CHECK(used == MIB);
  OK(cudaFreeAsync(block, NULL));
  OK(cudaMemPoolTrimTo(pool, 0));
  OK(cudaMemPoolGetAttribute(pool, 7, &used));
  CHECK(used == 0);
  driver_pools(pool);
  EXPECT(801, cudaGraphAddNode());
  CHECK(strstr(cudaGetErrorString(801), "not simulated: cudaGraphAddNode") != NULL);

  peers();
  OK(cudaFree(b));
  OK(cudaFree(managed));
  OK(cudaFreeHost(host));
  OK(cudaDeviceSynchronize());
  OK(cudaMemGetInfo(&free1, &total));
  CHECK(free1 == free0);
  puts("ok");
}
