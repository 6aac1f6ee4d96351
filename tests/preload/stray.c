/* Work on memory that was thrown away by a pause: with SIRE_DUMMY=1 it reads junk and writes nowhere that matters; without, the context is lost.
 * argv: 1 | 0. */
#include "support.h"

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int dummy = argv[1][0] == '1';
    char *cache = allocate_in(region_of("cache", 0), 70 * MiB), *weights = allocate_in(region_of("weights", 1), 4 * MiB);
    fill(weights, 4 * MiB, 5);
    uint64_t used = device_used(0);
    OK(sire_pause(NULL, NULL, NULL));
    CHECK(device_used(0) == (dummy ? 2 * MiB : 0));
    cudaError stray = cudaMemset(cache, 1, 70 * MiB);
    if (stray == 0) stray = cudaDeviceSynchronize();
    CHECK((stray == 0) == dummy);
    if (!dummy) return 0;
    /* What has a backup has no dummy: a stray write there would be lost. It is a usage error as ever, so it is not tried. */
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(device_used(0) == used && holds(weights, 4 * MiB, 5));
    char stats[8192];
    size_t length = 0;
    OK(sire_stats_json(stats, sizeof stats, &length));
    CHECK(strstr(stats, "\"dummies\":{\"bytes\":0,\"strays\":1,\"veiled_bytes\":0}"));
    fill(cache, 70 * MiB, 6);
    CHECK(holds(cache, 70 * MiB, 6));
    OK(sire_pause("cache", NULL, NULL));
    CUDA(0, cudaFree(cache));
    CUDA(0, cudaFree(weights));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
