/* PyTorch's fills run; any other kernel is refused by name; device variables hold what is copied to them. */
#include "cuda.h"

#define FILL(type) "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorI" type "ESt5arrayIPcLm1EELb0EEEviT0_T1_"
static char fill_float, fill_complex, fill_half, fill_byte, strange, ternary, unknown, variable[16];

static void fill(const void *kernel, void *value, int n, void *to) {
  dim3_t one = {1, 1, 1};
  void *arguments[] = {&n, value, &to};
  OK(cudaLaunchKernel(kernel, one, one, arguments, 0, NULL));
}

int main(void) {
  void **image = __cudaRegisterFatBinary(NULL);
  __cudaRegisterFunction(image, &fill_float, NULL, FILL("fE"), -1, 0, 0, 0, 0, 0);
  __cudaRegisterFunction(image, &fill_complex, NULL, FILL("N3c107complexIdEEE"), -1, 0, 0, 0, 0, 0);
  __cudaRegisterFunction(image, &fill_half, NULL, FILL("N3c104HalfEE"), -1, 0, 0, 0, 0, 0);
  __cudaRegisterFunction(image, &fill_byte, NULL, FILL("N3c1013Float8_e4m3fnEE"), -1, 0, 0, 0, 0, 0);
  __cudaRegisterFunction(image, &strange, NULL, FILL("N3c106StrangeEE"), -1, 0, 0, 0, 0, 0);
  __cudaRegisterFunction(image, &ternary, NULL, "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEESt5arrayIPcLm3EEEEviT0_T1_", -1, 0, 0, 0, 0, 0);
  __cudaRegisterFunction(image, &unknown, NULL, "_Z13softmax_thingPfi", -1, 0, 0, 0, 0, 0);
  __cudaRegisterVar(image, variable, NULL, "variable", 0, sizeof variable, 0, 0);
  double *memory, back[64], pair[2] = {1.25, -7};
  OK(cudaMalloc((void **)&memory, sizeof back));
  fill(&fill_complex, pair, 31, memory);
  OK(cudaMemset(memory + 62, 0, 16));
  OK(cudaMemcpy(back, memory, sizeof back, 2));
  CHECK(back[0] == 1.25 && back[1] == -7 && back[60] == 1.25 && back[61] == -7 && back[62] == 0);
  float half_pi = 1.5f;
  fill(&fill_float, &half_pi, 128, memory);
  unsigned short half = 0x3C00;
  fill(&fill_half, &half, 3, memory);
  OK(cudaMemcpy(back, memory, sizeof back, 2));
  CHECK(((float *)back)[127] == 1.5f && ((unsigned short *)back)[2] == 0x3C00 && ((unsigned short *)back)[3] != 0x3C00);

  unsigned char eight = 0x38;
  fill(&fill_byte, &eight, 5, memory);
  OK(cudaMemcpy(back, memory, 8, 2));
  CHECK(memcmp(back, "\x38\x38\x38\x38\x38", 5) == 0 && ((unsigned char *)back)[5] != 0x38);

  dim3_t one = {1, 1, 1};
  EXPECT(801, cudaLaunchKernel(&strange, one, one, NULL, 0, NULL));
  EXPECT(801, cudaLaunchKernel(&ternary, one, one, NULL, 0, NULL));
  EXPECT(801, cudaLaunchKernel(&unknown, one, one, NULL, 0, NULL));
  CHECK(strstr(cudaGetErrorString(801), "softmax_thing") != NULL);
  EXPECT(801, cudaGetLastError());
  EXPECT(98, cudaLaunchKernel(back, one, one, NULL, 0, NULL));
  OK((cudaGetLastError(), cudaDeviceSynchronize()));

  char text[16] = "constant", read[16];
  OK(cudaMemcpyToSymbol(variable, text, 8, 4, 1));
  OK(cudaMemcpyFromSymbol(read, variable, 16, 0, 2));
  CHECK(memcmp(read, "\0\0\0\0constant\0\0\0\0", 16) == 0);
  EXPECT(1, cudaMemcpyToSymbol(variable, text, 8, 9, 1));
  EXPECT(13, cudaMemcpyToSymbol(text, text, 8, 0, 1));
  puts("ok");
}
