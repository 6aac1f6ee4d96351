/* What a tag costs among very many.
 *
 *     scale ALLOCATIONS TAGS SAMPLES
 *
 * Makes TAGS tags with ALLOCATIONS / TAGS allocations of 512 bytes each, with host backup. SAMPLES of them are paused and resumed one by
 * one, first the first alone in the process, then those spread over all, with everything alive. Bytes of the tags that are paused
 * are different everywhere and compared afterwards. One line of JSON: seconds per sample, and the bookkeeping bytes per allocation. */
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

static void print_list(const char *name, const double *values, long count) {
    printf("\"%s\": [", name);
    for (long i = 0; i < count; i++) printf("%s%.9f", i ? ", " : "", values[i]);
    printf("], ");
}

int main(int argc, char **argv) {
    MUST(argc == 4);
    size_t count = (size_t)atoll(argv[1]), tags = (size_t)atoll(argv[2]);
    long samples = atol(argv[3]);
    MUST(tags > 0 && count % tags == 0 && samples > 0 && (size_t)samples <= tags);
    each = count / tags;
    open_region = (sire_status(*)(const char *, const sire_region_options *, uint32_t *))sire("sire_region_open");
    pause_tag = (sire_status(*)(const char *, const sire_pause_options *, sire_report *))sire("sire_pause");
    resume_tag = (sire_status(*)(const char *, const sire_resume_options *, sire_report *))sire("sire_resume");
    enter = (sire_status(*)(uint32_t, int32_t))sire("sire_region_enter");
    leave = (sire_status(*)(uint32_t))sire("sire_region_leave");
    MUST(open_region && pause_tag && resume_tag && enter && leave);
    at = calloc(count, sizeof *at);
    memset(at, 1, count * sizeof *at);
    double *alone = calloc((size_t)samples, sizeof *alone), *among = calloc((size_t)samples, sizeof *among);

    make(0);
    cycle(0, 0);
    for (long i = 0; i < samples; i++) alone[i] = cycle(0, (uint64_t)i + 1);
    double before = proc_bytes("/proc/self/status", "RssAnon:"), start = now();
    for (size_t tag = 1; tag < tags; tag++) make(tag);
    double seconds = now() - start;
    double bytes = proc_bytes("/proc/self/status", "RssAnon:") - before, made = (double)(count - each);
    for (long i = 0; i < samples; i++) {
        size_t tag = (size_t)i * (tags / (size_t)samples);
        cycle(tag, 99);
        among[i] = cycle(tag, 100);
    }
    printf("{");
    print_list("alone", alone, samples);
    print_list("among", among, samples);
    printf("\"allocate_ns\": %.3f, \"bytes_per_allocation\": %.3f, \"per_tag\": %zu}\n", made > 0 ? seconds / made * 1e9 : 0,
           made > 0 ? bytes / made : 0, each);
    return 0;
}
