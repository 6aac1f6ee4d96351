/* What the programs of scripts/bench share: bytes that are different everywhere and in every generation, and a host buffer that is there
 * before anything is timed. The programs speak the CUDA runtime and the `tms_*` functions only, which Sire and torch_memory_saver both
 * export, so the very same program runs under either. */
#ifndef PEER_H
#define PEER_H

#include "../bench.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TO_DEVICE = 1, TO_HOST = 2, HUGE_PAGE = 2 << 20 };
/* The exit status that says: bytes were wrong. */
enum { WRONG_BYTES = 3 };

cudaError cudaMemset(void *to, int value, size_t bytes);

static inline uint64_t pattern_key(uint64_t index, uint64_t generation) {
    uint64_t key = (index + 1) * 0x9E3779B97F4A7C15u ^ (generation + 1) * 0xC2B2AE3D27D4EB4Fu;
    return (key ^ key >> 29) * 0xBF58476D1CE4E5B9u;
}

/* Words `first ..` of the allocation `index`. */
static inline void pattern_write(uint64_t *to, size_t words, uint64_t first, uint64_t index, uint64_t generation) {
    uint64_t key = pattern_key(index, generation) + first;
    for (size_t i = 0; i < words; i++) to[i] = (key + i) * 0xD6E8FEB86659FD93u;
}

static inline int pattern_holds(const uint64_t *from, size_t words, uint64_t first, uint64_t index, uint64_t generation) {
    uint64_t key = pattern_key(index, generation) + first, wrong = 0;
    for (size_t i = 0; i < words; i++) wrong |= from[i] ^ (key + i) * 0xD6E8FEB86659FD93u;
    return wrong == 0;
}

static inline void wrong_bytes(const char *where, size_t index) {
    fprintf(stderr, "wrong bytes %s, in allocation %zu\n", where, index);
    exit(WRONG_BYTES);
}

/* Host memory, aligned to huge pages and of huge pages where the kernel grants them. */
static inline char *host_map(size_t bytes) {
    char *whole = mmap(NULL, bytes + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(whole != MAP_FAILED);
    char *start = (char *)(((uintptr_t)whole + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    madvise(start, bytes, MADV_HUGEPAGE);
    return start;
}

/* As `host_map`, brought in, and known to the driver where it can be: the best that a copy can ask for. */
static inline char *host_buffer(size_t bytes) {
    char *start = host_map(bytes);
    memset(start, 1, bytes);
    int (*know)(void *, size_t, unsigned) = (int (*)(void *, size_t, unsigned))dlsym(RTLD_DEFAULT, "cudaHostRegister");
    if (know) know(start, bytes, 0);
    return start;
}

/* Takes as much device memory as a pause has given back, and leaves other bytes in it. */
static inline void overwrite(size_t pieces, size_t piece) {
    void **taken = calloc(pieces, sizeof *taken);
    uint64_t word;
    for (size_t i = 0; i < pieces; i++) MUST(cudaMalloc(&taken[i], piece) == 0 && cudaMemset(taken[i], 0xEE, piece) == 0);
    MUST(cudaMemcpy(&word, taken[pieces - 1], sizeof word, TO_HOST) == 0);
    for (size_t i = 0; i < pieces; i++) MUST(cudaFree(taken[i]) == 0);
    free(taken);
}

/* A line of a /proc file that starts with `name`, in bytes. */
static inline double proc_bytes(const char *path, const char *name) {
    FILE *file = fopen(path, "r");
    char line[256];
    double bytes = 0;
    while (file && fgets(line, sizeof line, file)) {
        if (!strncmp(line, name, strlen(name))) bytes = atof(line + strlen(name)) * 1024;
    }
    if (file) fclose(file);
    return bytes;
}

#endif
