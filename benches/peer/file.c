/* A region whose backup is a file that holds its bytes already.
 *
 *     file BYTES PIECES DIRECTORY
 *
 * Writes a file, loads it into device memory, and says of each allocation where in the file its bytes are. Each line on standard input is one
 * cycle: pause, the file out of the page cache, all free device memory overwritten, resume, every byte compared. The answer is one line of
 * JSON. The first pause proves that the file holds the bytes, and is told apart (`first`). No backup may be in host memory. Exit
 * status 4: the library does not offer it. */
#include "peer.h"

enum { NOT_OFFERED = 4, IN_FILES = 3 };

static size_t piece, pieces;
static uint64_t *window;
static void **at;

static int make_file(char *path, const char *directory) {
    snprintf(path, 4096, "%s/sire-bench-XXXXXX", directory);
    int file = mkstemp(path);
    MUST(file >= 0);
    for (size_t i = 0; i < pieces; i++) {
        pattern_write(window, piece / 8, 0, i, 1);
        MUST(pwrite(file, window, piece, (off_t)(i * piece)) == (ssize_t)piece);
    }
    MUST(fsync(file) == 0);
    return file;
}

static double share_cached(int file) {
    size_t pages = piece * pieces / 4096, found = 0;
    void *map = mmap(NULL, piece * pieces, PROT_READ, MAP_SHARED, file, 0);
    MUST(map != MAP_FAILED);
    unsigned char *present = calloc(pages, 1);
    MUST(mincore(map, piece * pieces, present) == 0);
    for (size_t i = 0; i < pages; i++) found += present[i] & 1;
    free(present);
    munmap(map, piece * pieces);
    return (double)found / (double)pages;
}

/* Bytes of host backups, as the statistics say. */
static double host_bytes(void) {
    sire_status (*stats)(char *, size_t, size_t *) = (sire_status(*)(char *, size_t, size_t *))sire("sire_stats_json");
    static char text[1 << 16];
    MUST(stats && stats(text, sizeof text, NULL) == SIRE_STATUS_OK);
    const char *tier = strstr(text, "\"tier\":\"host\"");
    const char *used = tier ? strstr(tier, "\"used_bytes\":") : NULL;
    MUST(used);
    return atof(used + strlen("\"used_bytes\":"));
}

int main(int argc, char **argv) {
    MUST(argc == 4);
    pieces = (size_t)atoll(argv[2]), piece = (size_t)atoll(argv[1]) / pieces;
    MUST(pieces > 0 && piece % 4096 == 0);
    sire_status (*open_region)(const char *, const void *, uint32_t *) = (sire_status(*)(const char *, const void *, uint32_t *))sire("sire_region_open");
    sire_status (*attach)(const void *, size_t, const char *, uint64_t) =
        (sire_status(*)(const void *, size_t, const char *, uint64_t))sire("sire_attach_file");
    sire_status (*pause_tag)(const char *, const void *, void *) = (sire_status(*)(const char *, const void *, void *))sire("sire_pause");
    sire_status (*resume_tag)(const char *, const void *, void *) = (sire_status(*)(const char *, const void *, void *))sire("sire_resume");
    sire_status (*enter)(uint32_t, int32_t) = (sire_status(*)(uint32_t, int32_t))sire("sire_region_enter");
    sire_status (*leave)(uint32_t) = (sire_status(*)(uint32_t))sire("sire_region_leave");
    MUST(open_region && pause_tag && resume_tag && enter && leave);
    sire_region_options options = {.struct_size = sizeof options, .backup = IN_FILES};
    uint32_t region = 0;
    if (!attach || open_region("model", &options, &region) != SIRE_STATUS_OK) {
        fprintf(stderr, "the library does not keep content in files\n");
        return NOT_OFFERED;
    }
    char path[4096];
    window = (uint64_t *)host_buffer(piece);
    at = calloc(pieces, sizeof *at);
    int file = make_file(path, argv[3]);
    MUST(enter(region, 0) == SIRE_STATUS_OK);
    for (size_t i = 0; i < pieces; i++) {
        MUST(cudaMalloc(&at[i], piece) == 0);
        pattern_write(window, piece / 8, 0, i, 1);
        MUST(cudaMemcpy(at[i], window, piece, TO_DEVICE) == 0);
        MUST(attach(at[i], piece, path, i * piece) == SIRE_STATUS_OK);
    }
    MUST(leave(region) == SIRE_STATUS_OK);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        double start = now();
        MUST(pause_tag("model", NULL, NULL) == SIRE_STATUS_OK);
        double pause = now() - start, host = host_bytes();
        MUST(fdatasync(file) == 0 && posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED) == 0);
        double cached = share_cached(file);
        overwrite(pieces, piece);
        start = now();
        MUST(resume_tag("model", NULL, NULL) == SIRE_STATUS_OK);
        double resume = now() - start;
        for (size_t i = 0; i < pieces; i++) {
            MUST(cudaMemcpy(window, at[i], piece, TO_HOST) == 0);
            if (!pattern_holds(window, piece / 8, 0, i, 1)) unlink(path), wrong_bytes("after the resume", i);
        }
        printf("{\"pause\": %.9f, \"resume\": %.9f, \"cached\": %.4f, \"host\": %.0f}\n", pause, resume, cached, host);
        fflush(stdout);
    }
    unlink(path);
    return 0;
}
