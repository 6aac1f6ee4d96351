/* A forked child: Sire is dead there, unmaps nothing, and says so; the parent does not notice. */
#include "support.h"
#include <sys/wait.h>
#include <unistd.h>

static int child(uint32_t region, void *ours) {
    EXPECT(SIRE_STATUS_INACTIVE, sire_pause(NULL, NULL, NULL));
    SAYS("fork");
    EXPECT(SIRE_STATUS_INACTIVE, sire_resume(NULL, NULL, NULL));
    EXPECT(SIRE_STATUS_INACTIVE, sire_free(ours));
    EXPECT(SIRE_STATUS_INACTIVE, sire_region_enter(region, 0));
    EXPECT(SIRE_STATUS_INACTIVE, sire_region_open("child", NULL, NULL));
    EXPECT(SIRE_STATUS_INACTIVE, sire_stats_json(NULL, 0, NULL));
    CHECK(!sire_owns(ours));
    OK(sire_cancel());
    CHECK(sire_torch_pool_malloc(4096, 0, NULL) == NULL);
    /* Tensors that were inherited go without a word. */
    cudaGetLastError();
    sire_torch_free(ours, 3 * MiB, 0, NULL);
    CHECK(cudaGetLastError() == 0);
    /* Hooks pass everything through; what CUDA says in a forked child is CUDA's affair, but it must say something. */
    void *out = NULL;
    if (cudaMalloc(&out, 4096) == 0) cudaFree(out);
    cudaFree(ours);
    return 0;
}

int main(void) {
    uint32_t region = region_of("parent", 1);
    void *ours = allocate_in(region, 3 * MiB);
    fill(ours, 3 * MiB, 9);
    uint64_t used = device_used(0);
    /* The child is inside a region when it is born, which must not matter either. */
    OK(sire_region_enter(region, 0));
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) exit(child(region, ours));
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    OK(sire_region_leave(region));
    CHECK(device_used(0) == used && holds(ours, 3 * MiB, 9));
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(ours, 3 * MiB, 9));
    CUDA(0, cudaFree(ours));
    return 0;
}
