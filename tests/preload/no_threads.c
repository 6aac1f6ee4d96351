/* A system that has no more threads to give: what works with several at once does it one after the other, and nobody waits for a thread that does not come. */
#define _GNU_SOURCE
#include "support.h"
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

enum { SIZE = 64 * MiB };

static atomic_int refuses, refused;

/* Stands before the C library's, for the libraries too. */
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    if (atomic_load(&refuses)) {
        atomic_fetch_add(&refused, 1);
        return EAGAIN;
    }
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = NULL;
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return real ? real(thread, attributes, run, argument) : EAGAIN;
}

/* Two regions whose content, if `clean`, is said not to change: then a switch has nothing to copy out, and whoever gives memory would be faster than whoever
 * takes it. */
static void regions(const char *a, const char *b, int clean) {
    sire_region_options options = {.struct_size = sizeof options, .backup = 1, .clean = clean};
    uint32_t region = 0;
    OK(sire_region_open(a, &options, &region));
    char *one = allocate_in(region, SIZE);
    fill(one, SIZE, 1);
    OK(sire_pause(a, NULL, NULL));
    OK(sire_region_open(b, &options, &region));
    char *two = allocate_in(region, SIZE);
    fill(two, SIZE, 2);
    OK(sire_switch(b, a, NULL, NULL, NULL));
    for (int without = 0; without < 2; without++) {
        atomic_store(&refuses, without);
        int before = atomic_load(&refused);
        OK(sire_switch(a, b, NULL, NULL, NULL));
        CHECK(holds(two, SIZE, 2) && device_used(0) <= SIZE + 2 * MiB);
        OK(sire_switch(b, a, NULL, NULL, NULL));
        CHECK(holds(one, SIZE, 1) && device_used(0) <= SIZE + 2 * MiB);
        OK(sire_pause(a, NULL, NULL));
        OK(sire_resume(a, NULL, NULL));
        CHECK(holds(one, SIZE, 1));
        CHECK((atomic_load(&refused) > before) == without);
    }
    atomic_store(&refuses, 0);
    CUDA(0, cudaFree(one));
    CUDA(0, cudaFree(two));
}

int main(void) {
    alarm(60);
    regions("a", "b", 0);
    regions("c", "d", 1);
    return 0;
}
