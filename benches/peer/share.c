/* One process of several that hold the same model and pause it.
 *
 *     share BYTES
 *
 * Fills an immutable region with bytes that are the same in every process; then pauses it; then resumes and compares every byte. It says
 * when each of the three is done and waits for a line on standard input, so that its memory can be looked at. Exit status 4: the library
 * does not offer it. */
#include "peer.h"

enum { NOT_OFFERED = 4, PIECE = 32 << 20 };

/* Says that a step is done, and waits to be told to go on. */
static void step(const char *name) {
    char line[16];
    printf("{\"done\": \"%s\"}\n", name);
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin)) exit(0);
}

int main(int argc, char **argv) {
    MUST(argc == 2);
    size_t pieces = (size_t)atoll(argv[1]) / PIECE;
    sire_status (*open_region)(const char *, const void *, uint32_t *) = (sire_status(*)(const char *, const void *, uint32_t *))sire("sire_region_open");
    sire_status (*pause_tag)(const char *, const void *, void *) = (sire_status(*)(const char *, const void *, void *))sire("sire_pause");
    sire_status (*resume_tag)(const char *, const void *, void *) = (sire_status(*)(const char *, const void *, void *))sire("sire_resume");
    sire_status (*enter)(uint32_t, int32_t) = (sire_status(*)(uint32_t, int32_t))sire("sire_region_enter");
    sire_status (*leave)(uint32_t) = (sire_status(*)(uint32_t))sire("sire_region_leave");
    MUST(pieces > 0 && open_region && pause_tag && resume_tag && enter && leave);
    sire_region_options options = {.struct_size = sizeof options, .backup = 1, .retain = true, .clean = 1};
    uint32_t region = 0;
    if (open_region("model", &options, &region) != SIRE_STATUS_OK) return NOT_OFFERED;
    void **at = calloc(pieces, sizeof *at);
    uint64_t *window = (uint64_t *)host_buffer(PIECE);
    MUST(enter(region, 0) == SIRE_STATUS_OK);
    for (size_t i = 0; i < pieces; i++) {
        MUST(cudaMalloc(&at[i], PIECE) == 0);
        pattern_write(window, PIECE / 8, 0, i, 3);
        MUST(cudaMemcpy(at[i], window, PIECE, TO_DEVICE) == 0);
    }
    MUST(leave(region) == SIRE_STATUS_OK);
    step("filled");
    MUST(pause_tag("model", NULL, NULL) == SIRE_STATUS_OK);
    step("paused");
    MUST(resume_tag("model", NULL, NULL) == SIRE_STATUS_OK);
    for (size_t i = 0; i < pieces; i++) {
        MUST(cudaMemcpy(window, at[i], PIECE, TO_HOST) == 0);
        if (!pattern_holds(window, PIECE / 8, 0, i, 3)) wrong_bytes("after the resume", i);
    }
    step("compared");
    return 0;
}
