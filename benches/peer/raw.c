/* The disk's and the memory's own limits, without Sire.
 *
 *     raw warm BYTES                      touches that much memory, so that the machine really has it
 *     raw copy BYTES                      seconds of one memcpy of BYTES by one thread, prefaulted on both sides
 *     raw disk DIRECTORY BYTES DEPTH...   seconds to write and to read BYTES with O_DIRECT, DEPTH requests of 4 MiB in flight
 *
 * The answer is one line of JSON, for each depth; with a + before it (+8) also of requests whose bytes come from other memory, or go there: the
 * thread that makes a request copies them. What is read is compared. The file is preallocated, and has been written once before
 * anything is timed, as the retained room of a backup has: blocks that were only allocated cost a write more. */
#include "peer.h"
#include <pthread.h>
#include <stdatomic.h>

enum { REQUEST = 4 << 20 };

struct job {
    int file, reading;
    size_t requests;
    atomic_size_t *next;
    uint64_t *buffer;
    char *memory; /* where the bytes come from or go to; NULL: nowhere */
};

static void *worker(void *argument) {
    struct job *job = argument;
    for (size_t i; (i = atomic_fetch_add(job->next, 1)) < job->requests;) {
        off_t at = (off_t)(i * REQUEST);
        if (job->reading) {
            MUST(pread(job->file, job->buffer, REQUEST, at) == REQUEST);
            if (job->buffer[0] != i || job->buffer[REQUEST / 8 - 1] != ~i) wrong_bytes("read from the disk", i);
            if (job->memory) memcpy(job->memory + at, job->buffer, REQUEST);
        } else {
            if (job->memory) memcpy(job->buffer, job->memory + at, REQUEST);
            job->buffer[0] = i, job->buffer[REQUEST / 8 - 1] = ~i;
            MUST(pwrite(job->file, job->buffer, REQUEST, at) == REQUEST);
        }
    }
    return NULL;
}

static double pass(int file, size_t bytes, int depth, int reading, char *buffers, char *memory) {
    atomic_size_t next = 0;
    pthread_t threads[64];
    struct job jobs[64];
    double start = now();
    for (int i = 0; i < depth; i++) {
        jobs[i] = (struct job){file, reading, bytes / REQUEST, &next, (uint64_t *)(buffers + (size_t)i * REQUEST), memory};
        MUST(pthread_create(&threads[i], NULL, worker, &jobs[i]) == 0);
    }
    for (int i = 0; i < depth; i++) MUST(pthread_join(threads[i], NULL) == 0);
    if (!reading) MUST(fdatasync(file) == 0);
    return now() - start;
}

static int disk(const char *directory, size_t bytes, char *depths[], int count) {
    MUST(bytes % REQUEST == 0 && bytes > 0);
    int file = open(directory, O_TMPFILE | O_RDWR | O_DIRECT, 0600), most = 4, fed = 0;
    if (file < 0) {
        fprintf(stderr, "%s: no file with O_DIRECT: %s\n", directory, strerror(errno));
        return 1;
    }
    MUST(posix_fallocate(file, 0, (off_t)bytes) == 0);
    for (int i = 0; i < count; i++) {
        int depth = atoi(depths[i]);
        MUST(depth >= 1 && depth <= 64);
        most = depth > most ? depth : most;
        fed |= depths[i][0] == '+';
    }
    char *memory = fed ? host_map(bytes) : NULL;
    if (fed) memset(memory, 5, bytes);
    char *buffers = host_map((size_t)most * REQUEST);
    for (size_t i = 0; i < (size_t)most * REQUEST / 8; i++) ((uint64_t *)buffers)[i] = pattern_key(i, 0);
    pass(file, bytes, most, 0, buffers, NULL);
    for (int i = 0; i < count; i++) {
        int depth = atoi(depths[i]);
        double write = pass(file, bytes, depth, 0, buffers, NULL), read = pass(file, bytes, depth, 1, buffers, NULL);
        printf("{\"depth\": %d, \"write\": %.9f, \"read\": %.9f", depth, write, read);
        if (depths[i][0] == '+') {
            write = pass(file, bytes, depth, 0, buffers, memory), read = pass(file, bytes, depth, 1, buffers, memory);
            printf(", \"fed_write\": %.9f, \"fed_read\": %.9f", write, read);
        }
        printf("}\n");
    }
    return 0;
}

int main(int argc, char **argv) {
    MUST(argc >= 3);
    if (!strcmp(argv[1], "disk")) {
        MUST(argc >= 5);
        return disk(argv[2], (size_t)atoll(argv[3]), argv + 4, argc - 4);
    }
    size_t bytes = (size_t)atoll(argv[2]);
    double start = now();
    char *from = host_map(bytes);
    memset(from, 3, bytes);
    double touch = now() - start, copy = 0;
    if (!strcmp(argv[1], "copy")) {
        char *to = host_map(bytes);
        memset(to, 4, bytes);
        start = now();
        memcpy(to, from, bytes);
        copy = now() - start;
        if (memcmp(to, from, bytes)) wrong_bytes("after memcpy", 0);
    }
    printf("{\"touch\": %.9f, \"copy\": %.9f, \"huge\": %.4f}\n", touch, copy,
           proc_bytes("/proc/self/smaps_rollup", "AnonHugePages:") / (double)bytes / (copy > 0 ? 2 : 1));
    return 0;
}
