/* A process that has neither a CUDA runtime nor a driver: errors with advice, and nothing worse. */
#include "support.h"
#include <dlfcn.h>

int main(void) {
    uint32_t region = 7;
    EXPECT(SIRE_STATUS_NO_DRIVER, sire_region_open("a", NULL, &region));
    CHECK(region == 7);
    SAYS("SIRE_LIBCUDA");
    SAYS("sire software-env");
    EXPECT(SIRE_STATUS_NO_DRIVER, sire_pause(NULL, NULL, NULL));
    EXPECT(SIRE_STATUS_NO_DRIVER, sire_free((void *)4096));
    CHECK(!sire_owns((void *)4096));
    OK(sire_cancel());

    size_t length = 0;
    char json[4096];
    OK(sire_stats_json(json, sizeof json, &length));
    CHECK(length == strlen(json) && strstr(json, "\"driver\":null") && strstr(json, "\"hook_live\":true"));

    cudaError (*hooked)(void **, size_t) = (cudaError(*)(void **, size_t))dlsym(RTLD_DEFAULT, "cudaMalloc");
    void *out = NULL;
    CUDA(302, hooked(&out, 16));
    CHECK(out == NULL);
    CHECK(sire_torch_pool_malloc(0, 0, NULL) == NULL);
    CHECK(sire_torch_pool_malloc(16, 0, NULL) == NULL);
    sire_torch_free(NULL, 0, 0, NULL);
    return 0;
}
