/* Backups on a disk that reads slowly are compressed where that saves bytes (SIRE_DISK_COMPRESS=1), and nowhere else. */
#include "support.h"
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIZE = 32 * MiB, RECORD = 1 * MiB, RECORDS = SIZE / RECORD, TRIALS = 8 };

static atomic_int reads;

/* The library's reads of backup files outside the kernel's queue: 80 MB a second. */
ssize_t pread64(int file, void *to, size_t bytes, off_t at) {
    char link[64], target[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, target, sizeof target - 1);
    const char *disk = getenv("SIRE_DISK_DIR");
    if (length > 0 && !strncmp(target, disk, strlen(disk))) {
        reads++;
        usleep(bytes / 80);
    }
    return syscall(SYS_pread64, file, to, bytes, at);
}

/* Bytes of backups on the disk. */
static size_t on_disk(void) {
    static char json[64 * KiB];
    OK(sire_stats_json(json, sizeof json, NULL));
    const char *disk = strstr(json, "\"tier\":\"disk\"");
    CHECK(disk != NULL);
    return strtoull(strstr(disk, "\"used_bytes\":") + strlen("\"used_bytes\":"), NULL, 10);
}

/* Numbers of 16 bits whose upper bytes are `kinds` different ones. */
static unsigned char *numbers(int kinds) {
    unsigned char *bytes = malloc(SIZE);
    CHECK(bytes != NULL);
    unsigned long long state = 0x123456789ABCDEF1;
    for (size_t i = 0; i < SIZE; i += 2) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        bytes[i] = (unsigned char)(state >> 20);
        bytes[i + 1] = (unsigned char)((state >> 40) % kinds);
    }
    return bytes;
}

int main(void) {
    /* The noise is judged first: regions are in the order in which they were made. */
    unsigned char *kept[2] = {numbers(256), numbers(8)}, *back = malloc(SIZE);
    void *device[2];
    const char *tags[2] = {"noise", "weights"};
    CHECK(back != NULL);
    for (int i = 0; i < 2; i++) {
        device[i] = allocate_in(region_of(tags[i], 2), SIZE);
        CUDA(0, cudaMemcpy(device[i], kept[i], SIZE, TO_DEVICE));
    }
    OK(sire_pause(NULL, NULL, NULL));
    for (int i = 0; i < 6000 && (reads == 0 || on_disk() >= 2 * SIZE); i++) usleep(10 * 1000);
    size_t used = on_disk();
    fprintf(stderr, "%zu of %d bytes are on the disk after %d reads\n", used, 2 * SIZE, reads);
    /* Three bits of eight are left of every second byte. */
    CHECK(used > SIZE + SIZE / 2 && used < SIZE + SIZE / 4 * 3);
    /* Some of both were tried, and then all of the weights. */
    CHECK(reads == 2 * TRIALS + RECORDS);
    OK(sire_resume(NULL, NULL, NULL));
    for (int i = 0; i < 2; i++) {
        CUDA(0, cudaMemcpy(back, device[i], SIZE, TO_HOST));
        CHECK(!memcmp(back, kept[i], SIZE));
    }
    return 0;
}
