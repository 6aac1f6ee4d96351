/* The end of a process, in every order: whoever frees last finds nothing broken and does not hang. argv: what was registered before Sire started
 * (early) or after (late), and what runs at the end: handler (atexit), destructor (of this program), library (of one that is loaded, argv[3], at exit),
 * closed (the same, at its dlclose). Each frees memory of a region, paused or not, and memory of CUDA's, and looks for a function. */
#define _GNU_SOURCE
#include "support.h"
#include <unistd.h>

static void *ours, *paused, *plain;
static const char *how = "";

/* 4: the runtime, or the driver, has gone already. */
#define MAY_BE_GONE(call) do { int code_ = (call); CHECK(code_ == 0 || code_ == 4); } while (0)

static void finish(void) {
    MAY_BE_GONE(cudaFree(ours));
    MAY_BE_GONE(cudaFree(paused));
    MAY_BE_GONE(cudaFree(plain));
    sire_resume(NULL, NULL, NULL);
    CHECK(dlsym(RTLD_DEFAULT, "cudaMalloc") != NULL);
    size_t length = 0;
    sire_stats_json(NULL, 0, &length);
    if (write(1, "finished\n", 9) != 9) _exit(9);
}

__attribute__((destructor)) static void destructor(void) {
    if (!strcmp(how, "destructor")) finish();
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    alarm(60);
    how = argv[2];
    int early = !strcmp(argv[1], "early"), handler = !strcmp(how, "handler");
    int of_library = !strcmp(how, "library") || !strcmp(how, "closed");
    void *library = NULL;
    if (early && of_library) library = dlopen(argv[3], RTLD_NOW | RTLD_LOCAL);
    if (early && handler) CHECK(atexit(finish) == 0);
    uint32_t region = region_of("stays", 1), goes = region_of("goes", 1);
    ours = allocate_in(region, 3 * MiB);
    paused = allocate_in(goes, 3 * MiB);
    CUDA(0, cudaMalloc(&plain, MiB));
    OK(sire_pause("goes", NULL, NULL));
    if (!early && of_library) library = dlopen(argv[3], RTLD_NOW | RTLD_LOCAL);
    if (!early && handler) CHECK(atexit(finish) == 0);
    if (of_library) {
        if (!library) fprintf(stderr, "%s\n", dlerror());
        CHECK(library != NULL);
        void (**last)(void) = (void (**)(void))dlsym(library, "exit_last");
        CHECK(last != NULL);
        *last = finish;
        if (!strcmp(how, "closed")) CHECK(dlclose(library) == 0);
    }
    return 0;
}
