/* What the library says of wrong use: for each refusal the status, and the words that tell what was asked, what is missing and what to do. What wrong use does
 * not break is bad_input.c's. argv: a directory for ledgers. */
#include "support.h"
#include "virtual.h"
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define SAID(status, words, call) do { EXPECT(SIRE_STATUS_##status, call); SAYS(words); } while (0)

static int fails(void *context, const uint32_t *regions, size_t count, const sire_range **out, size_t *out_count) {
    (void)context, (void)regions, (void)count, (void)out, (void)out_count;
    return 77;
}

static int odd(void *context, const uint32_t *regions, size_t count, const sire_range **out, size_t *out_count) {
    (void)regions, (void)count;
    *out = (const sire_range *)((char *)context + 1), *out_count = 1;
    return 0;
}

static void strings(void) {
    char *text = malloc(MiB + 2);
    memset(text, 'x', MiB + 1);
    text[MiB + 1] = 0;
    SAID(INVALID_ARGUMENT, "is longer than 4096 bytes; the longest tag has 255", sire_pause(text, NULL, NULL));
    SAID(INVALID_ARGUMENT, "is NULL, but is needed", sire_region_open(NULL, NULL, NULL));
    SAID(INVALID_ARGUMENT, "is not UTF-8", sire_resume("\xff", NULL, NULL));
    SAID(INVALID_ARGUMENT, "is NULL or empty, but is needed", sire_attach_file(NULL, 1, "", 0));
    SAID(INVALID_ARGUMENT, "the directory is an empty string", sire_set_disk_directory(""));
    SAID(INVALID_ARGUMENT, "the tag \"\" cannot be used: it is empty", sire_region_open("", NULL, NULL));
    free(text);
}

static void structs(uint32_t region) {
    (void)region;
    sire_region_options small = {.struct_size = 0}, clean = {.struct_size = sizeof clean, .backup = 0, .clean = 1};
    SAID(INVALID_ARGUMENT, "struct_size is 0; set it to sizeof(sire_region_options)", sire_region_open("s", &small, NULL));
    SAID(INVALID_ARGUMENT, "clean is set, but backup is 0 (none): there is nothing that could stand for the content", sire_region_open("s", &clean, NULL));
    struct { sire_region_options known; uint64_t news; } newer = {{.struct_size = sizeof newer}, 1};
    SAID(VERSION_MISMATCH, "is set, but this library knows only", sire_region_open("s", &newer.known, NULL));
    SAID(INVALID_ARGUMENT, "the standing is NULL", sire_standing_set("said", NULL));
    SAID(INVALID_ARGUMENT, "the budget is NULL", sire_budget_set(0, NULL));
    SAID(INVALID_ARGUMENT, "the options are NULL: nobody would know how long a turn lasts", sire_time_slice_open(0, NULL));
    sire_reserve_options reserve = {.struct_size = sizeof reserve, .bytes = MiB};
    sire_reservation *reservation = NULL;
    SAID(INVALID_ARGUMENT, "the options are NULL: nobody would know what to reserve", sire_reserve(0, NULL, &reservation));
    SAID(INVALID_ARGUMENT, "out_reservation is NULL: nobody could end the reservation", sire_reserve(0, &reserve, NULL));
    SAID(INVALID_ARGUMENT, "0 bytes are no reservation; release it instead", sire_reservation_resize(NULL, 0, 0.0, 0));
    SAID(INVALID_ARGUMENT, "the reservation is NULL", sire_reservation_resize(NULL, 1, 0.0, 0));
    SAID(INVALID_ARGUMENT, "out_mark is NULL: nobody could take the consent back", sire_reclaimable_open("said", NULL, NULL));
    SAID(INVALID_ARGUMENT, "there is no mark 4711; was it closed?", sire_reclaimable_used(4711, 0.0));
    uint64_t mark = 0;
    SAID(INVALID_ARGUMENT, "a//b", sire_reclaimable_open("a//b", &(sire_reclaimable_options){.struct_size = sizeof(sire_reclaimable_options)}, &mark));
    /* What was refused has not opened it. */
    SAID(INACTIVE, "the control socket was never opened; call sire_control_open first", sire_control_publish("{}"));
    SAID(INVALID_ARGUMENT, "-1 seconds: it must be 0 or more", sire_control_wait(-1.0, NULL));
}

static void transitions(uint32_t region) {
    SAID(INVALID_ARGUMENT, "out_progress is NULL: nobody would know when the memory can be used", sire_resume_start("said", NULL, NULL));
    SAID(INVALID_ARGUMENT, "the progress is NULL", sire_progress_report(NULL, NULL));
    uint64_t place[4] = {0};
    sire_pause_options fails_at = {.struct_size = sizeof fails_at, .dead_ranges = fails}, odd_at = {.struct_size = sizeof odd_at, .dead_ranges = odd, .dead_ranges_context = place};
    SAID(INVALID_ARGUMENT, "the program's dead_ranges function failed, so nothing was paused", sire_pause("said", &fails_at, NULL));
    SAID(INVALID_ARGUMENT, "dead_ranges: the ranges are at an address that is no multiple of 8", sire_pause("said", &odd_at, NULL));
    sire_pause_options lazy = {.struct_size = sizeof lazy, .release = 1}, idle = {.struct_size = sizeof idle, .idle = 1};
    SAID(INVALID_ARGUMENT, "a switch gives memory back now: release must be 0", sire_switch("said", "other", &lazy, NULL, NULL));
    SAID(INVALID_ARGUMENT, "a switch waits for the devices: idle must be 0", sire_switch("said", "other", &idle, NULL, NULL));
    sire_pause_options alone = {.struct_size = sizeof alone, .alone = 1};
    SAID(INVALID_ARGUMENT, "a switch takes along what is under its tags: alone must be 0", sire_switch("said", "other", &alone, NULL, NULL));
    SAID(INVALID_ARGUMENT, "alone is 1, but no tag is named", sire_pause(NULL, &alone, NULL));
    alone.alone = 2;
    SAID(INVALID_ARGUMENT, "alone is 2; it must be 0", sire_pause("said", &alone, NULL));
    int32_t state = -1;
    OK(sire_region_state(region, &state));
    CHECK(state == 0);
}

static void threads(uint32_t region) {
    uint32_t inner = region_of("said/inner", 0);
    void *out = NULL;
    SAID(INVALID_ARGUMENT, "this thread is in no region; was region", sire_region_leave(region));
    SAID(INVALID_ARGUMENT, "this thread is in no region of device 0; call sire_region_enter first", sire_allocate(16, 0, NULL, &out));
    SAID(INVALID_ARGUMENT, "this thread is not suspended", sire_region_unsuspend());
    int suspended = 0;
    while (sire_region_suspend() == SIRE_STATUS_OK) CHECK(++suspended < 1 << 20);
    SAYS("this thread is suspended 65535 times already; each needs its sire_region_unsuspend");
    while (suspended-- > 0) OK(sire_region_unsuspend());
    SAID(INVALID_ARGUMENT, "no capture is in progress", sire_capture_end());
    SAID(INVALID_ARGUMENT, "region 'said/inner' has no lease that could end", sire_unlease("said/inner"));
    SAID(UNKNOWN_TAG, "there is no region number 4000000", sire_region_enter(4000000, 0));
    SAID(INVALID_ARGUMENT, "device is -2; it must be an ordinal, or -1 (every device)", sire_region_enter_on(region, -2, 0));
    OK(sire_region_enter(region, 0));
    OK(sire_region_enter(inner, 0));
    SAID(INVALID_ARGUMENT, "is not this thread's innermost; region", sire_region_leave(region));
    SAID(BUSY, "1 thread is inside", sire_pause("said/inner", NULL, NULL));
    OK(sire_region_leave(inner));
    SAID(INVALID_ARGUMENT, "0 bytes were asked for", sire_allocate(0, 0, NULL, &out));
    SAID(INVALID_ARGUMENT, "out is NULL: the memory could not be freed again", sire_allocate(16, 0, NULL, NULL));
    OK(sire_set_margin((size_t)1 << 50));
    SAID(OUT_OF_DEVICE_MEMORY, "1125899906842624 must stay free; pause or free something there", sire_allocate(MiB, 0, NULL, &out));
    OK(sire_set_margin(0));
    OK(sire_region_leave(region));
    CHECK(out == NULL);
}

static void memory(uint32_t region) {
    char *ours = allocate_in(region, 3 * MiB);
    SAID(UNKNOWN_ADDRESS, "is not the start of a live allocation", sire_free(ours + 4096));
    SAID(INVALID_ARGUMENT, "does not keep its content in files", sire_attach_file(ours, MiB, "/dev/null", 0));
    const void *data = NULL;
    void *token = NULL;
    SAID(UNKNOWN_ADDRESS, "have no host backup; was the region paused with one?", sire_backup_get(ours, MiB, &data, &token));
    SAID(BACKUP_IO, "it is not a regular file", sire_attach_file(allocate_in(region_of("file", 3), MiB), MiB, "/dev/null", 0));
    sire_torch_set_memory_fraction(-0.5, 0);
    SAYS("-0.5 is no part of a device's memory");
    sire_torch_set_memory_fraction(NAN, 0);
    SAYS("is no part of a device's memory");
    CUDA(0, cudaFree(ours));
    /* Physical memory that a program makes itself, where the driver gives none for a reason of its own. */
    int (*create)(uint64_t *, size_t, const properties *, unsigned long long) = NULL;
    CUDA(0, cudaGetDriverEntryPointByVersion("cuMemCreate", (void **)&create, 12000, 0, NULL));
    uint64_t handle = 0;
    properties asked = {.kind = 1, .where = {1, 0}};
    OK(sire_region_enter(region, 0));
    device_fault("cuMemCreate=error:999");
    CHECK(create(&handle, 2 * MiB, &asked, 0) == 2 && handle == 0);
    device_fault("");
    SAYS("making physical memory in region 'said'");
    OK(sire_region_leave(region));
}

/* torch_memory_saver's functions return nothing, or a number that its callers ignore: the reason is the last error. */
static void tms(void) {
    void *out = NULL;
    char text[300];
    memset(text, 't', sizeof text);
    text[sizeof text - 1] = 0;
    tms_set_interesting_region(true);
    tms_set_enable_cpu_backup(true);
    tms_set_enable_disk_backup(true);
    CHECK(cudaMalloc(&out, MiB) != 0);
    SAYS("CPU backup and disk backup are both on; choose one");
    tms_set_enable_disk_backup(false);
    tms_set_current_tag(text);
    SAYS("the tag has 299 bytes; the longest has 255");
    CHECK(cudaMalloc(&out, MiB) != 0);
    SAYS("the thread's tag was refused (see the message at tms_set_current_tag); set another");
    tms_set_current_tag("fine");
    CUDA(0, cudaMalloc(&out, MiB));
    CUDA(0, cudaFree(out));
    tms_set_interesting_region(false);
    cudaGetLastError();
}

/* A turn would pause what a fence keeps from everybody else. */
static void turns(const char *directory) {
    sire_reserve_options wish = {.struct_size = sizeof wish, .bytes = 4 * MiB, .fence = 2, .directory = directory};
    sire_time_slice_options turn = {.struct_size = sizeof turn, .quantum_seconds = 1.0, .directory = directory};
    sire_reservation *reservation = NULL;
    OK(sire_reserve(0, &wish, &reservation));
    SAID(UNSUPPORTED, "keeps its memory from everybody else, so a pause would make no room; take turns without a reservation", sire_time_slice_open(0, &turn));
    OK(sire_reservation_release(reservation));
}

/* Whoever wants others to give way asks them through their sockets, which lie in a directory that nobody else may write to. */
static void asking_others(const char *directory) {
    sire_reserve_options wish = {.struct_size = sizeof wish, .bytes = MiB, .directory = directory, .preempt = 1};
    sire_reservation *reservation = NULL;
    char sockets[4096];
    snprintf(sockets, sizeof sockets, "%s/open", directory);
    CHECK(mkdir(sockets, 0700) == 0 && setenv("XDG_RUNTIME_DIR", sockets, 1) == 0);
    strcat(sockets, "/sire");
    CHECK(mkdir(sockets, 0700) == 0 && chmod(sockets, 0755) == 0);
    SAID(UNSUPPORTED, "other processes cannot be asked to give way: ", sire_reserve(0, &wish, &reservation));
    SAYS("/open/sire is not this user's alone (owner, mode 0700); remove it, or set XDG_RUNTIME_DIR");
    CHECK(setenv("XDG_RUNTIME_DIR", directory, 1) == 0);
}

/* Another process, made before this one has used a device: it takes the turn when it is told, and keeps it until it is killed. */
static pid_t other(int orders, int answers, const char *directory) {
    pid_t child = fork();
    CHECK(child >= 0);
    char byte;
    if (child == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (child > 0 || read(orders, &byte, 1) != 1) return child;
    sire_time_slice_options turn = {.struct_size = sizeof turn, .quantum_seconds = 3600.0, .directory = directory};
    OK(sire_time_slice_open(0, &turn));
    CHECK(write(answers, &byte, 1) == 1);
    for (;;) pause();
}

static void *cancel(void *over) {
    for (; !atomic_load((atomic_int *)over); usleep(1000)) sire_cancel();
    return NULL;
}

static void waits(pid_t child, int orders, int answers, const char *directory) {
    sire_time_slice_options turn = {.struct_size = sizeof turn, .quantum_seconds = 1.0, .directory = directory, .timeout_seconds = 0.2};
    char byte = 0;
    CHECK(write(orders, &byte, 1) == 1 && read(answers, &byte, 1) == 1);
    SAID(BUSY, "no turn on the device in the time given: another process has it", sire_time_slice_open(0, &turn));
    pthread_t thread;
    atomic_int over = 0;
    turn.timeout_seconds = 60;
    CHECK(pthread_create(&thread, NULL, cancel, &over) == 0);
    SAID(CANCELLED, "the wait for a turn on the device was cancelled", sire_time_slice_open(0, &turn));
    atomic_store(&over, 1);
    CHECK(pthread_join(thread, NULL) == 0 && kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
}

/* Marks that nobody closes: an end of them. */
static void marks(void) {
    uint64_t mark = 0;
    sire_reclaimable_options terms = {.struct_size = sizeof terms};
    for (int i = 0; i < 256; i++) OK(sire_reclaimable_open("said", &terms, &mark));
    SAID(UNSUPPORTED, "256 marks are open already; close some", sire_reclaimable_open("said", &terms, &mark));
    SAID(INVALID_ARGUMENT, "the figures are no JSON", sire_control_publish("{"));
    SAID(INVALID_ARGUMENT, "the figures is NULL, but is needed", sire_control_publish(NULL));
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    int orders[2], answers[2];
    CHECK(pipe(orders) == 0 && pipe(answers) == 0);
    pid_t child = other(orders[0], answers[1], argv[1]);
    uint32_t region = region_of("said", 1);
    CUDA(0, cudaFree(allocate_in(region, MiB)));
    strings();
    structs(region);
    transitions(region);
    threads(region);
    memory(region);
    tms();
    turns(argv[1]);
    asking_others(argv[1]);
    waits(child, orders[1], answers[0], argv[1]);
    marks();
    return 0;
}
