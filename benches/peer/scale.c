/* What a tag costs among very many.
 *
 *     scale ALLOCATIONS TAGS
 *
 * Makes TAGS tags with ALLOCATIONS / TAGS allocations of 512 bytes each, with host backup, and says as a line of JSON what that cost. Then, at each
 * line with the number of a tag, pauses and resumes that one, twice, and says how many seconds the second time took. Bytes of the tag are
 * different everywhere and compared afterwards. A process with one tag beside one with very many shows what the others cost. */
#include "peer.h"

enum { SIZE = 512 };

static size_t each;
static void **at;
static sire_status (*open_region)(const char *, const sire_region_options *, uint32_t *);
static sire_status (*pause_tag)(const char *, const sire_pause_options *, sire_report *);
static sire_status (*resume_tag)(const char *, const sire_resume_options *, sire_report *);
static sire_status (*enter)(uint32_t, int32_t), (*leave)(uint32_t);

static void name_of(size_t tag, char out[32]) { snprintf(out, 32, "scale/%zu", tag); }

static void fill(size_t tag, uint64_t generation) {
    uint64_t words[SIZE / 8];
    for (size_t i = tag * each; i < (tag + 1) * each; i++) {
        pattern_write(words, SIZE / 8, 0, i, generation);
        MUST(cudaMemcpy(at[i], words, SIZE, TO_DEVICE) == 0);
    }
}

static void compare(size_t tag, uint64_t generation) {
    uint64_t words[SIZE / 8];
    for (size_t i = tag * each; i < (tag + 1) * each; i++) {
        MUST(cudaMemcpy(words, at[i], SIZE, TO_HOST) == 0);
        if (!pattern_holds(words, SIZE / 8, 0, i, generation)) wrong_bytes("after the resume", i);
    }
}

static void make(size_t tag) {
    char name[32];
    uint32_t region = 0;
    sire_region_options options = {.struct_size = sizeof options, .backup = 1, .retain = true};
    name_of(tag, name);
    MUST(open_region(name, &options, &region) == SIRE_STATUS_OK && enter(region, 0) == SIRE_STATUS_OK);
    for (size_t i = tag * each; i < (tag + 1) * each; i++) MUST(cudaMalloc(&at[i], SIZE) == 0);
    MUST(leave(region) == SIRE_STATUS_OK);
}

/* Seconds of a pause and a resume of the tag, checked. */
static double cycle(size_t tag, uint64_t generation) {
    char name[32];
    name_of(tag, name);
    fill(tag, generation);
    double start = now();
    MUST(pause_tag(name, NULL, NULL) == SIRE_STATUS_OK && resume_tag(name, NULL, NULL) == SIRE_STATUS_OK);
    double seconds = now() - start;
    compare(tag, generation);
    return seconds;
}

int main(int argc, char **argv) {
    MUST(argc == 3);
    size_t count = (size_t)atoll(argv[1]), tags = (size_t)atoll(argv[2]);
    MUST(tags > 0 && count > 0 && count % tags == 0);
    each = count / tags;
    open_region = (sire_status(*)(const char *, const sire_region_options *, uint32_t *))sire("sire_region_open");
    pause_tag = (sire_status(*)(const char *, const sire_pause_options *, sire_report *))sire("sire_pause");
    resume_tag = (sire_status(*)(const char *, const sire_resume_options *, sire_report *))sire("sire_resume");
    enter = (sire_status(*)(uint32_t, int32_t))sire("sire_region_enter");
    leave = (sire_status(*)(uint32_t))sire("sire_region_leave");
    MUST(open_region && pause_tag && resume_tag && enter && leave);
    at = calloc(count, sizeof *at);
    memset(at, 1, count * sizeof *at);

    make(0);
    cycle(0, 0);
    double before = proc_bytes("/proc/self/status", "RssAnon:"), start = now();
    for (size_t tag = 1; tag < tags; tag++) make(tag);
    double seconds = now() - start;
    double bytes = proc_bytes("/proc/self/status", "RssAnon:") - before, made = (double)(count - each);
    printf("{\"allocate_ns\": %.3f, \"bytes_per_allocation\": %.3f}\n", made > 0 ? seconds / made * 1e9 : 0, made > 0 ? bytes / made : 0);
    fflush(stdout);

    char line[32];
    for (uint64_t generation = 1; fgets(line, sizeof line, stdin); generation += 2) {
        size_t tag = (size_t)atoll(line);
        MUST(tag < tags);
        cycle(tag, generation);
        printf("{\"seconds\": %.9f}\n", cycle(tag, generation + 1));
        fflush(stdout);
    }
    return 0;
}
