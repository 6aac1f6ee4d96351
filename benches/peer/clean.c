/* What a pause costs whose content an earlier pause has saved already, beside one that throws everything away.
 *
 *     clean BYTES PIECES SAMPLES declared|verified
 *
 * Two regions of the same size: one without a backup, one whose backup may stand for what has not changed. Each sample pauses and resumes both,
 * in turns, and compares every byte of the second after its resume, for which the memory was overwritten meanwhile. Where content is verified,
 * looking at it is timed as well, by a sire_pre_copy that finds nothing changed. Then one page is changed (and said to be changed, if declared),
 * and the pause after that must save it. One line of JSON: seconds and bytes per sample.
 * Exit status 4: the library does not offer it. */
#include "peer.h"

enum { NOT_OFFERED = 4, PAGE = 2 << 20 };

static size_t pieces, piece;
static char *window;
static sire_status (*open_region)(const char *, const void *, uint32_t *);
static sire_status (*pause_tag)(const char *, const sire_pause_options *, sire_report *);
static sire_status (*resume_tag)(const char *, const sire_resume_options *, sire_report *);
static sire_status (*pre_copy)(const char *, sire_report *);
static sire_status (*enter)(uint32_t, int32_t), (*leave)(uint32_t);

static void **make(const char *tag, int backup, int clean) {
    sire_region_options options = {.struct_size = sizeof options, .backup = backup, .retain = clean != 0, .clean = clean};
    uint32_t region = 0;
    if (open_region(tag, &options, &region) != SIRE_STATUS_OK) {
        fprintf(stderr, "the library does not offer regions with clean = %d\n", clean);
        exit(NOT_OFFERED);
    }
    void **at = calloc(pieces, sizeof *at);
    MUST(enter(region, 0) == SIRE_STATUS_OK);
    for (size_t i = 0; i < pieces; i++) MUST(cudaMalloc(&at[i], piece) == 0);
    MUST(leave(region) == SIRE_STATUS_OK);
    return at;
}

static void write_piece(void **at, size_t index, uint64_t generation) {
    pattern_write((uint64_t *)window, piece / 8, 0, index, generation);
    MUST(cudaMemcpy(at[index], window, piece, TO_DEVICE) == 0);
}

static void compare(void **at, size_t changed, uint64_t generation) {
    for (size_t i = 0; i < pieces; i++) {
        MUST(cudaMemcpy(window, at[i], piece, TO_HOST) == 0);
        if (!pattern_holds((uint64_t *)window, piece / 8, 0, i, i == changed ? generation : 0)) wrong_bytes("after the resume", i);
    }
}

static double pause_of(const char *tag, double *copied) {
    sire_report report = {.struct_size = sizeof report};
    double start = now();
    MUST(pause_tag(tag, NULL, &report) == SIRE_STATUS_OK);
    double seconds = now() - start;
    *copied = (double)report.bytes_copied;
    return seconds;
}

/* Seconds of looking at the pages of the region, none of which has changed. */
static double look_at(const char *tag, size_t bytes) {
    sire_report report = {.struct_size = sizeof report};
    double start = now();
    MUST(pre_copy(tag, &report) == SIRE_STATUS_OK);
    double seconds = now() - start;
    MUST(report.bytes_copied == 0 && report.bytes_hashed == bytes);
    return seconds;
}

static void print_list(const char *name, const double *values, long count, const char *form, const char *after) {
    printf("\"%s\": [", name);
    for (long i = 0; i < count; i++) printf("%s", i ? ", " : ""), printf(form, values[i]);
    printf("]%s", after);
}

static void resume_of(const char *tag) {
    MUST(resume_tag(tag, NULL, NULL) == SIRE_STATUS_OK);
}

int main(int argc, char **argv) {
    MUST(argc == 5);
    size_t bytes = (size_t)atoll(argv[1]);
    pieces = (size_t)atoll(argv[2]), piece = bytes / pieces;
    long samples = atol(argv[3]);
    int clean = !strcmp(argv[4], "declared") ? 1 : 2;
    MUST(pieces > 1 && samples > 0 && piece % PAGE == 0);
    open_region = (sire_status(*)(const char *, const void *, uint32_t *))sire("sire_region_open");
    pause_tag = (sire_status(*)(const char *, const sire_pause_options *, sire_report *))sire("sire_pause");
    resume_tag = (sire_status(*)(const char *, const sire_resume_options *, sire_report *))sire("sire_resume");
    pre_copy = (sire_status(*)(const char *, sire_report *))sire("sire_pre_copy");
    enter = (sire_status(*)(uint32_t, int32_t))sire("sire_region_enter");
    leave = (sire_status(*)(uint32_t))sire("sire_region_leave");
    sire_status (*say_changed)(void *, size_t) = (sire_status(*)(void *, size_t))sire("sire_changed");
    MUST(open_region && pause_tag && resume_tag && enter && leave && (clean == 1 || pre_copy));
    window = host_buffer(piece);
    void **kept = make("kept", 1, clean), **thrown = make("thrown", 0, 0);
    for (size_t i = 0; i < pieces; i++) write_piece(kept, i, 0), write_piece(thrown, i, 1);

    /* The first pause saves. */
    double *with = calloc((size_t)samples, sizeof *with), *without = calloc((size_t)samples, sizeof *without);
    double *copied = calloc((size_t)samples, sizeof *copied), *looks = calloc((size_t)samples, sizeof *looks), nothing = 0, first = 0;
    double first_seconds = pause_of("kept", &first);
    MUST(first >= (double)bytes);
    resume_of("kept");
    for (long i = 0; i < samples; i++) {
        for (int turn = 0; turn < 2; turn++) {
            if (turn == (i % 4 == 1 || i % 4 == 2)) {
                without[i] = pause_of("thrown", &nothing);
                MUST(nothing == 0);
                resume_of("thrown");
            } else {
                if (clean == 2) looks[i] = look_at("kept", bytes);
                with[i] = pause_of("kept", &copied[i]);
                overwrite(pieces, piece);
                resume_of("kept");
                compare(kept, 0, 0);
            }
        }
    }
    /* What changes is saved again: a fast pause that loses a change would be worth nothing. */
    write_piece(kept, 1, 7);
    if (clean == 1) {
        if (say_changed) MUST(say_changed(kept[1], piece) == SIRE_STATUS_OK);
        else write_piece(kept, 1, 0);
    }
    double again = 0;
    pause_of("kept", &again);
    overwrite(pieces, piece);
    resume_of("kept");
    compare(kept, 1, clean == 2 || say_changed ? 7 : 0);

    printf("{\"first\": %.9f, \"again\": %.0f, ", first_seconds, again);
    print_list("clean", with, samples, "%.9f", ", ");
    print_list("discard", without, samples, "%.9f", ", ");
    print_list("looks", looks, samples, "%.9f", ", ");
    print_list("copied", copied, samples, "%.0f", "}\n");
    return 0;
}
