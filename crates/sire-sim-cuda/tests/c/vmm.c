/* The virtual-memory calls keep the manual's rules; what breaks them is refused and changes nothing. */
#include "cuda.h"

int main(void) {
  prop_t prop = device_memory(0), wrong = prop;
  size_t grain, free0, free1, total;
  ctx_t context, current;
  OK(cuInit(0));
  EXPECT(201, cuMemGetInfo_v2(&free0, &total));
  EXPECT(201, cuCtxGetDevice((int *)&grain));
  OK(cuMemGetAllocationGranularity(&grain, &prop, 0));
  CHECK(grain == 2 * MIB);

  ptr_t va, other, handle, again;
  OK(cuMemAddressReserve(&va, 4 * grain, 0, 0, 0)); /* no context needed */
  EXPECT(1, cuMemAddressReserve(&other, grain + 1, 0, 0, 0));
  OK(cuMemCreate(&handle, 2 * grain, &prop, 0));
  EXPECT(1, cuMemCreate(&other, grain + 4096, &prop, 0));
  EXPECT(2, cuMemCreate(&other, (size_t)1 << 40, &prop, 0));
  wrong.kind = 2;
  EXPECT(1, cuMemCreate(&other, grain, &wrong, 0));
  wrong = prop;
  wrong.handle_types = 8; /* fabric */
  EXPECT(801, cuMemCreate(&other, grain, &wrong, 0));
  wrong = prop;
  wrong.location.id = 7;
  EXPECT(101, cuMemCreate(&other, grain, &wrong, 0));

  EXPECT(1, cuMemMap(va, 2 * grain, grain, handle, 0));
  EXPECT(1, cuMemMap(va + 4096, 2 * grain, 0, handle, 0));
  OK(cuMemMap(va, 2 * grain, 0, handle, 0));
  EXPECT(1, cuMemMap(va + grain, 2 * grain, 0, handle, 0));
  access_t access = {.location = {1, 0}, .flags = 3};
  unsigned long long rights = 9;
  OK(cuMemGetAccess(&rights, &access.location, va));
  CHECK(rights == 0);
  EXPECT(1, cuMemSetAccess(va, 4 * grain, &access, 1));
  OK(cuMemSetAccess(va, 2 * grain, &access, 1));
  OK(cuMemGetAccess(&rights, &access.location, va));
  CHECK(rights == 3);
  OK(cuMemRelease(handle)); /* mapped: the memory stays */
  OK(cuMemRetainAllocationHandle(&again, (void *)(va + grain)));

  OK(cuDevicePrimaryCtxRetain(&context, 0));
  OK(cuCtxPushCurrent_v2(context));
  OK(cuCtxGetCurrent(&current));
  CHECK(current == context);
  OK(cuMemGetInfo_v2(&free0, &total));
  CHECK(total - free0 == 2 * grain);
  stream_t stream;
  OK(cuStreamCreateWithPriority(&stream, 1, 0));
  unsigned words[1024];
  OK(cuMemsetD32Async(va + 2 * grain - sizeof words, 0xABCD1234, 1024, stream));
  OK(cuMemcpyDtoHAsync_v2(words, va + 2 * grain - sizeof words, sizeof words, stream));
  OK(cuStreamSynchronize(stream));
  CHECK(words[0] == 0xABCD1234 && words[1023] == 0xABCD1234);
  OK(cuMemHostRegister_v2(words, sizeof words, 0));
  OK(cuMemHostUnregister(words));

  ptr_t base;
  size_t size;
  OK(cuMemGetAddressRange_v2(&base, &size, va + 100));
  CHECK(base == va && size == 2 * grain);
  unsigned kind, ordinal;
  int which[2] = {2, 9};
  void *where[2] = {&kind, &ordinal};
  OK(cuPointerGetAttributes(2, which, where, va));
  CHECK(kind == 2 && ordinal == 0);
  EXPECT(1, cuPointerGetAttribute(&kind, 2, (ptr_t)words));

  EXPECT(1, cuMemUnmap(va, grain));
  EXPECT(1, cuMemAddressFree(va, 4 * grain));
  OK(cuMemUnmap(va, 2 * grain));
  EXPECT(1, cuMemUnmap(va, 2 * grain));
  OK(cuMemRelease(again));
  EXPECT(1, cuMemRelease(again) ? 1 : 0);
  OK(cuMemGetInfo_v2(&free1, &total));
  CHECK(free1 == total);
  OK(cuMemAddressFree(va, 4 * grain));
  EXPECT(1, cuMemAddressFree(va, 4 * grain));

  /* a handle as a file descriptor */
  int descriptor;
  prop.handle_types = 1;
  prop.flags[1] = 1; /* GPUDirect RDMA */
  OK(cuMemCreate(&handle, grain, &prop, 0));
  prop_t same;
  OK(cuMemGetAllocationPropertiesFromHandle(&same, handle));
  CHECK(same.handle_types == 1 && same.flags[1] == 1 && same.location.id == 0 && same.kind == 1);
  OK(cuMemExportToShareableHandle(&descriptor, handle, 1, 0));
  OK(cuMemImportFromShareableHandle(&again, (void *)(intptr_t)descriptor, 1));
  close(descriptor);
  OK(cuMemRelease(handle));
  OK(cuMemGetInfo_v2(&free1, &total));
  CHECK(total - free1 == grain);
  OK(cuMemRelease(again));
  prop.handle_types = 0;
  OK(cuMemCreate(&handle, grain, &prop, 0));
  EXPECT(1, cuMemExportToShareableHandle(&descriptor, handle, 1, 0));
  OK(cuMemRelease(handle));

  OK(cuStreamDestroy_v2(stream));
  OK(cuCtxPopCurrent_v2(&current));
  CHECK(current == context);
  EXPECT(201, cuCtxPopCurrent_v2(&current));
  unsigned flags;
  int active;
  OK(cuDevicePrimaryCtxGetState(0, &flags, &active));
  CHECK(active == 1);
  OK(cuDevicePrimaryCtxRelease_v2(0));
  OK(cuDevicePrimaryCtxGetState(0, &flags, &active));
  CHECK(active == 0);
  puts("ok");
}
