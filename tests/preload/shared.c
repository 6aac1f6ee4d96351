/* Two processes, both with Sire: memory outside regions goes over by a legacy handle; memory of a region that the program mapped itself goes
 * over by an exported descriptor, and is held from then on; what comes from the other process is never Sire's. argv: leaves | is killed. */
#define _GNU_SOURCE
#include "support.h"
#include "virtual.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static int (*Reserve)(uint64_t *, size_t, size_t, uint64_t, unsigned long long), (*AddressFree)(uint64_t, size_t);
static int (*Create)(uint64_t *, size_t, const properties *, unsigned long long), (*Release)(uint64_t);
static int (*Map)(uint64_t, size_t, size_t, uint64_t, unsigned long long), (*Unmap)(uint64_t, size_t);
static int (*SetAccess)(uint64_t, size_t, const permission *, size_t);
static int (*Export)(void *, uint64_t, int, unsigned long long), (*Import)(uint64_t *, void *, int);

static void look_up(void) {
#define GET(variable, name) CUDA(0, cudaGetDriverEntryPointByVersion(name, (void **)&variable, 12000, 0, NULL))
    GET(Reserve, "cuMemAddressReserve");
    GET(AddressFree, "cuMemAddressFree");
    GET(Create, "cuMemCreate");
    GET(Release, "cuMemRelease");
    GET(Map, "cuMemMap");
    GET(Unmap, "cuMemUnmap");
    GET(SetAccess, "cuMemSetAccess");
    GET(Export, "cuMemExportToShareableHandle");
    GET(Import, "cuMemImportFromShareableHandle");
}

enum { DESCRIPTOR = 10, TO_CHILD = 11, TO_PARENT = 12 };

static void tell(int pipe) { CHECK(write(pipe, "x", 1) == 1); }

static void hear(int pipe) {
    char word;
    CHECK(read(pipe, &word, 1) == 1);
}

static uint64_t map_whole(uint64_t physical, size_t bytes) {
    uint64_t at = 0;
    permission access = {{1, 0}, 3};
    CUDA(0, Reserve(&at, bytes, 0, 0, 0));
    CUDA(0, Map(at, bytes, 0, physical, 0));
    CUDA(0, SetAccess(at, bytes, &access, 1));
    return at;
}

/* Whatever the child does with its own regions, what it got stays as it is. */
static void child(void) {
    cudaIpcMemHandle handle;
    uint64_t imported = 0;
    void *opened = NULL;
    uint32_t region = region_of("mine", 1);
    CHECK(read(TO_CHILD, &handle, sizeof handle) == sizeof handle);
    OK(sire_region_enter(region, 0));
    CUDA(0, cudaIpcOpenMemHandle(&opened, handle, 1));
    CUDA(0, Import(&imported, (void *)(intptr_t)DESCRIPTOR, 1));
    uint64_t mapped = map_whole(imported, 4 * MiB);
    CUDA(0, Release(imported));
    OK(sire_region_leave(region));
    void *own = allocate_in(region, 2 * MiB);
    CHECK(holds(opened, 2 * MiB, 1) && holds((void *)mapped, 4 * MiB, 2));
    CHECK(!sire_owns(opened) && !sire_owns((void *)mapped) && sire_owns(own));
    sire_report report = {.struct_size = sizeof report};
    uint64_t used = device_used(0);
    OK(sire_pause(NULL, NULL, &report));
    CHECK(report.bytes_held == 0 && used - device_used(0) == 2 * MiB);
    CHECK(holds(opened, 2 * MiB, 1) && holds((void *)mapped, 4 * MiB, 2));
    fill(opened, 2 * MiB, 3);
    fill((void *)mapped, 4 * MiB, 4);
    OK(sire_resume(NULL, NULL, NULL));
    tell(TO_PARENT);
    hear(TO_CHILD);
    CUDA(0, cudaIpcCloseMemHandle(opened));
    CUDA(0, Unmap(mapped, 4 * MiB));
    CUDA(0, AddressFree(mapped, 4 * MiB));
    CUDA(0, cudaFree(own));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 4 * MiB); /* the other's two */
}

static pid_t start(const char *program, int descriptor, int to_child[2], int to_parent[2]) {
    CHECK(pipe2(to_child, O_CLOEXEC) == 0 && pipe2(to_parent, O_CLOEXEC) == 0);
    pid_t pid = fork();
    if (pid == 0) {
        int from[] = {descriptor, to_child[0], to_parent[1]};
        for (int i = 0; i < 3; i++) from[i] = fcntl(from[i], F_DUPFD, 20);
        for (int i = 0; i < 3; i++) dup2(from[i], DESCRIPTOR + i);
        execl(program, program, "child", (char *)NULL);
        _exit(127);
    }
    CHECK(pid > 0);
    return pid;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    alarm(100);
    look_up();
    if (!strcmp(argv[1], "child")) {
        child();
        return 0;
    }
    uint32_t region = region_of("exported", 1);
    void *plain = NULL, *own = allocate_in(region, 2 * MiB);
    CUDA(0, cudaMalloc(&plain, 2 * MiB));
    fill(plain, 2 * MiB, 1);
    fill(own, 2 * MiB, 5);
    properties asked = {.kind = 1, .handle_types = 1, .where = {1, 0}};
    uint64_t physical = 0;
    int descriptor = -1, to_child[2], to_parent[2], status = 0;
    OK(sire_region_enter(region, 0));
    CUDA(0, Create(&physical, 4 * MiB, &asked, 0));
    uint64_t mapped = map_whole(physical, 4 * MiB);
    OK(sire_region_leave(region));
    fill((void *)mapped, 4 * MiB, 2);
    cudaIpcMemHandle handle;
    CUDA(0, cudaIpcGetMemHandle(&handle, plain));
    CUDA(801, cudaIpcGetMemHandle(&handle, (void *)mapped));
    SAYS("is in region 'exported'");
    CHECK(cudaGetLastError() == 0);
    /* What the runtime and the driver refuse, they refuse themselves; a failed export is held all the same, as nobody knows. */
    cudaIpcMemHandle none;
    device_fault("cudaIpcGetMemHandle=error:999; cuMemExportToShareableHandle=error:2");
    CUDA(999, cudaIpcGetMemHandle(&none, plain));
    CUDA(2, Export(&descriptor, physical, 1, 0));
    CHECK(descriptor == -1 && cudaGetLastError() == 999);
    device_fault("");
    CUDA(0, Export(&descriptor, physical, 1, 0));

    pid_t pid = start(argv[0], descriptor, to_child, to_parent);
    CHECK(write(to_child[1], &handle, sizeof handle) == sizeof handle);
    hear(to_parent[0]);
    CHECK(holds(plain, 2 * MiB, 3) && holds((void *)mapped, 4 * MiB, 4));
    sire_report report = {.struct_size = sizeof report};
    uint64_t used = device_used(0);
    OK(sire_pause("exported", NULL, &report));
    CHECK(report.bytes_held == 4 * MiB && used - device_used(0) == 2 * MiB);
    CHECK(holds((void *)mapped, 4 * MiB, 4));
    OK(sire_resume("exported", NULL, NULL));
    CHECK(holds(own, 2 * MiB, 5));

    /* The child has the memory open while it goes here: its frames stay for it. */
    CUDA(0, Unmap(mapped, 4 * MiB));
    CUDA(0, Release(physical));
    CUDA(0, AddressFree(mapped, 4 * MiB));
    CHECK(device_used(0) == used);
    if (strcmp(argv[1], "leaves")) {
        CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    } else {
        tell(to_child[1]);
        CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    CHECK(device_used(0) == 4 * MiB);
    CHECK(holds(plain, 2 * MiB, 3));
    CUDA(0, cudaFree(plain));
    CUDA(0, cudaFree(own));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
