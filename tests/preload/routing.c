/* Calls outside any region reach the caller's own runtime, whichever way it came in, with every argument as it was passed.
 * Runs on the counting runtimes of fixtures/: no device. argv: folder of plugin_12.so and plugin_13.so; "deepbind": they bind to themselves first. */
#define _GNU_SOURCE
#include "support.h"
#include <dlfcn.h>

static int how = RTLD_NOW | RTLD_LOCAL;

static void *must_open(const char *folder, const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    void *handle = dlopen(path, how);
    if (!handle) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return handle;
}

typedef int (*entry)(void);

int main(int argc, char **argv) {
    CHECK(argc == 2 || argc == 3);
    if (argc == 3) how |= RTLD_DEEPBIND;
    void *twelve = must_open(argv[1], "plugin_12.so");
    void *thirteen = must_open(argv[1], "plugin_13.so");
    entry run_12 = (entry)dlsym(twelve, "plugin_run"), run_13 = (entry)dlsym(thirteen, "plugin_run");
    entry count_12 = (entry)dlsym(twelve, "plugin_count"), count_13 = (entry)dlsym(thirteen, "plugin_count");
    CHECK(run_12 && run_13 && count_12 && count_13);

    CHECK(run_12() == 0);
    /* Each run calls cudaMalloc twice, the second time with a NULL that CUDA itself must refuse. */
    CHECK(count_12() == 2);
    CHECK(count_13() == 0);
    for (int i = 0; i < 3; i++) CHECK(run_13() == 0);
    CHECK(count_12() == 2);
    CHECK(count_13() == 6);

    /* An error is the last one of the runtime that made it, and of no other. */
    entry fail_12 = (entry)dlsym(twelve, "plugin_fail"), last_12 = (entry)dlsym(twelve, "plugin_last_error"), last_13 = (entry)dlsym(thirteen, "plugin_last_error");
    CHECK(fail_12 && last_12 && last_13);
    CHECK(fail_12() == 1 && count_12() == 3 && count_13() == 6);
    CHECK(last_13() == 0 && last_12() == 1 && last_12() == 0);

    /* A caller without a runtime of its own that found cudaMalloc in the global scope gets some runtime. */
    cudaError (*anyone)(void **, size_t) = (cudaError(*)(void **, size_t))dlsym(RTLD_DEFAULT, "cudaMalloc");
    CHECK(anyone != NULL);
    void *out = NULL;
    CUDA(0, anyone(&out, 16));
    CHECK(out != NULL && count_13() + count_12() == 10);
    return 0;
}
