/* The runtime comes in by an RTLD_LOCAL dlopen of a library that links it, as PyTorch's do: hooks serve it all the same, and two of them beside each other.
 * argv: paths of one or two libraries built from fixtures/local.c; the one on fixtures/second.c, if any, is called local_12.so. */
#include "support.h"

typedef struct {
    int on_second;
    int (*serve)(uint32_t), (*free)(void *), (*holds)(void *);
    void *(*allocate)(uint32_t), *(*allocate_outside)(void);
    void (*fill)(void *);
} Local;

static Local load(const char *path) {
    Local local = {.on_second = strstr(path, "local_12.so") != NULL};
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) fprintf(stderr, "%s\n", dlerror());
    CHECK(handle != NULL);
    struct { const char *name; void *place; } wanted[] = {{"local_serve", &local.serve}, {"local_free", &local.free}, {"local_holds", &local.holds},
        {"local_allocate", &local.allocate}, {"local_allocate_outside", &local.allocate_outside}, {"local_fill", &local.fill}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        *(void **)wanted[i].place = dlsym(handle, wanted[i].name);
        CHECK(*(void **)wanted[i].place != NULL);
    }
    return local;
}

/* How many calls have reached the second runtime; -1: there is none. */
static int second_calls(void) {
    void *library = dlopen("libcudart.so.12", RTLD_NOW | RTLD_NOLOAD);
    int (*calls)(void) = library ? (int (*)(void))dlsym(library, "second_calls") : NULL;
    return calls ? calls() : -1;
}

/* Memory of a region is Sire's whichever runtime is called; all other memory is its own runtime's. */
static void both(uint32_t region, const Local *locals) {
    void *ours[2], *plain[2];
    for (int i = 0; i < 2; i++) {
        ours[i] = locals[i].allocate(region);
        int before = second_calls();
        plain[i] = locals[i].allocate_outside();
        CHECK(second_calls() - before == (before >= 0 && locals[i].on_second));
        CHECK(sire_owns(ours[i]) && !sire_owns(plain[i]));
        locals[1 - i].fill(ours[i]);
    }
    OK(sire_pause("local", NULL, NULL));
    OK(sire_resume("local", NULL, NULL));
    for (int i = 0; i < 2; i++) {
        CHECK(locals[i].holds(ours[i]));
        CUDA(0, locals[1 - i].free(ours[i]));
        CHECK(!sire_owns(ours[i]));
        int before = second_calls();
        CUDA(0, locals[i].free(plain[i]));
        CHECK(second_calls() - before == (before >= 0 && locals[i].on_second));
    }
    printf("second runtime: %d\n", second_calls() >= 0);
}

int main(int argc, char **argv) {
    CHECK(argc == 2 || argc == 3);
    uint32_t region = UINT32_MAX;
    sire_region_options options = {.struct_size = sizeof options, .backup = 1};
    Local locals[2];
    for (int i = 0; i < argc - 1; i++) locals[i] = load(argv[1 + i]);
    CHECK(dlsym(RTLD_DEFAULT, "cudaGetDeviceCount") == NULL);
    OK(sire_region_open("local", &options, &region));
    if (argc == 3) both(region, locals);
    for (int i = 0; i < argc - 1; i++) CHECK(locals[i].serve(region) == 0);
    return 0;
}
