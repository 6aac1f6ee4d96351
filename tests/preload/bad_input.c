/* Everything a caller can get wrong: a clear error each time, nothing lost, and the library works on. */
#include "support.h"
#include <math.h>
#include <pthread.h>

static uint32_t region;

static void *leave_on_another_thread(void *unused) {
    (void)unused;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_leave(region));
    SAYS("another thread");
    return NULL;
}

static void nulls(void) {
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open(NULL, NULL, NULL));
    SAYS("NULL");
    OK(sire_region_open("nobody/wants/the/number", NULL, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_allocate(16, 0, NULL, NULL));
    OK(sire_free(NULL));
    CUDA(0, cudaFree(NULL));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_allocation(NULL, NULL, NULL, NULL, NULL));
    CHECK(sire_keep(NULL, 1) != SIRE_STATUS_OK);
    CHECK(sire_discard(NULL, 1) != SIRE_STATUS_OK);
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_changed(NULL, 1));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_attach_file(NULL, 1, NULL, 0));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_attach_file(NULL, 1, "", 0));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_attach_file(NULL, 1, "/dev/null", 0));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_keep_resident(NULL, NULL));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_require_usable(NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_backup_get(NULL, 1, NULL, NULL));
    OK(sire_backup_put(NULL));
    OK(sire_region_current(NULL));
    OK(sire_region_state(region, NULL));
    OK(sire_stats_json(NULL, 0, NULL));
    OK(sire_trim(NULL, NULL));
    OK(sire_hook_probe(NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_set_disk_directory(NULL));
    CHECK(sire_last_error(NULL, 0) > 0);
    CHECK(!sire_owns(NULL));
    CHECK(tms_get_cpu_backup_pointer(NULL, 1) == NULL);
    tms_set_current_tag(NULL);
    tms_set_current_tag("default");
    tms_set_cpu_backup_backend(NULL);
    tms_set_disk_backup_dir(NULL);
    sire_torch_free(NULL, 0, 0, NULL);
    size_t total = 0;
    CUDA(0, cudaMemGetInfo(NULL, &total));
    CHECK(total > 0);
}

static void tags(void) {
    char *long_tag = malloc(MiB + 1);
    memset(long_tag, 'a', MiB);
    long_tag[MiB] = 0;
    uint32_t out = 123;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open(long_tag, NULL, &out));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_pause(long_tag, NULL, NULL));
    long_tag[256] = 0;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open(long_tag, NULL, &out));
    long_tag[255] = 0;
    OK(sire_region_open(long_tag, NULL, NULL));
    free(long_tag);
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open("", NULL, &out));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open("a//b", NULL, &out));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open("\xff\xfe", NULL, &out));
    SAYS("UTF-8");
    CHECK(out == 123);
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_pause("never opened", NULL, NULL));
    SAYS("never opened");
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_resume("never opened", NULL, NULL));
}

static void structs(void) {
    uint32_t out = 123;
    sire_region_options options = {.struct_size = 0};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open("sized", &options, &out));
    SAYS("struct_size");
    options = (sire_region_options){.struct_size = sizeof options, .backup = 77};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open("sized", &options, &out));
    options = (sire_region_options){.struct_size = sizeof options, .backup = 1, .clean = 9};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open("sized", &options, &out));
    options = (sire_region_options){.struct_size = sizeof options, .backup = 0, .clean = 1};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_open("sized", &options, &out));
    CHECK(out == 123);
    /* An older header's struct ends before `backup`: the default, whatever lies behind it in memory. */
    options = (sire_region_options){offsetof(sire_region_options, backup), 99, true, true, 99, true, true};
    OK(sire_region_open("sized", &options, &out));
    uint32_t plain = 0;
    OK(sire_region_open("sized", NULL, &plain));
    CHECK(out == plain);
    /* A newer header's struct is longer: fine while what we do not know is not set. */
    struct { sire_region_options known; uint64_t news; } newer = {{.struct_size = sizeof newer}, 0};
    OK(sire_region_open("sized", &newer.known, &out));
    CHECK(out == plain);
    newer.news = 1;
    EXPECT(SIRE_STATUS_VERSION_MISMATCH, sire_region_open("sized", &newer.known, &out));

    struct { sire_report known; unsigned char guard[32]; } report;
    memset(&report, 0xAB, sizeof report);
    report.known.struct_size = 4;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_pause("sized", NULL, &report.known));
    int32_t state = -1;
    OK(sire_region_state(plain, &state));
    CHECK(state == 0);
    report.known.struct_size = offsetof(sire_report, allocations);
    OK(sire_pause("sized", NULL, &report.known));
    CHECK(report.known.regions_changed == 1 && report.known.allocations == 0xABABABABABABABABu);
    report.known.struct_size = sizeof report;
    OK(sire_resume("sized", NULL, &report.known));
    CHECK(report.known.regions_changed == 1 && report.known.allocations == 0);
    for (size_t i = 0; i < sizeof report.guard; i++) CHECK(report.guard[i] == 0xAB);

    sire_resume_options wait = {.struct_size = sizeof wait, .wait_seconds = NAN};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_resume(NULL, &wait, NULL));
    wait.wait_seconds = -1;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_resume(NULL, &wait, NULL));
    wait.wait_seconds = INFINITY;
    OK(sire_resume(NULL, &wait, NULL));
}

static void regions(void) {
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_leave(region));
    OK(sire_region_enter(region, 0));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_enter(region, 2));
    CHECK(sire_region_enter(4000000, 0) != SIRE_STATUS_OK);
    CHECK(sire_region_state(4000000, NULL) != SIRE_STATUS_OK);
    CHECK(sire_process_region_set(4000000) != SIRE_STATUS_OK);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, leave_on_another_thread, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    uint32_t inner = region_of("inner", 0), current = 0;
    OK(sire_region_enter(inner, 0));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_leave(region));
    SAYS("innermost");
    OK(sire_region_current(&current));
    CHECK(current == inner);
    /* Who is inside cannot be paused, not by itself either. */
    EXPECT(SIRE_STATUS_BUSY, sire_pause("bad", NULL, NULL));
    SAYS("bad");
    OK(sire_region_leave(inner));
    OK(sire_region_leave(region));
    OK(sire_region_current(&current));
    CHECK(current == UINT32_MAX);
    for (int i = 0; i < 64; i++) OK(sire_region_enter(region, 0));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_enter(region, 0));
    for (int i = 0; i < 64; i++) OK(sire_region_leave(region));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_region_unsuspend());
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_capture_end());
    void *out = NULL;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_allocate(16, 0, NULL, &out));
    SAYS("region");
}

static void pointers(void) {
    void *ours = allocate_in(region, 3 * MiB), *foreign = NULL;
    CUDA(0, cudaMalloc(&foreign, MiB));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_free(foreign));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_free(&ours));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_allocation(foreign, NULL, NULL, NULL, NULL));
    CUDA(0, cudaFree(foreign));
    CHECK(sire_free((char *)ours + 4096) != SIRE_STATUS_OK);
    CHECK(cudaFree((char *)ours + 4096) != 0);
    fill(ours, 3 * MiB, 5);
    CHECK(sire_keep(ours, 4 * MiB) != SIRE_STATUS_OK);
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_attach_file(ours, MiB, "/bin/true", 0));
    SAYS("file");
    size_t moved = 1;
    OK(sire_promote("bad", &moved));
    CHECK(moved == 0);
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_promote("never opened", NULL));
    CHECK(sire_discard((char *)ours + 1, (size_t)-1) != SIRE_STATUS_OK);
    sire_standing standing = {sizeof standing, 3, true, 0.5}, never = {sizeof never, 0, false, -1.0};
    OK(sire_standing_set("bad", &standing));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_standing_set("bad", NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_standing_set("bad", &never));
    SAYS("keep_alive_seconds");
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_standing_set("never opened", &standing));
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_lease("never opened"));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_unlease("bad"));
    OK(sire_lease("bad"));
    OK(sire_unlease("bad"));
    sire_budget budget = {sizeof budget, 0, 0, 0.0};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_budget_set(0, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_budget_set(-1, &budget));
    OK(sire_budget_set(0, &budget));
    sire_budget wanted = {sizeof wanted, 4096, 8192, 0.25}, found = {sizeof found, 7, 7, 7.0};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_budget_get(0, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_budget_get(-1, &found));
    OK(sire_budget_set(0, &wanted));
    OK(sire_budget_get(0, &found));
    CHECK(found.limit_bytes == 4096 && found.headroom_bytes == 8192 && found.residency_seconds == 0.25);
    /* As a program has it that was built before the last field. */
    sire_budget older = {offsetof(sire_budget, residency_seconds), 7, 7, 7.0};
    OK(sire_budget_get(0, &older));
    CHECK(older.headroom_bytes == 8192 && older.residency_seconds == 7.0);
    OK(sire_budget_set(0, &budget));
    OK(sire_budget_get(0, &found));
    CHECK(found.limit_bytes == 0 && found.headroom_bytes == 0 && found.residency_seconds == 0.0);
    size_t given = 7, length = 7;
    OK(sire_make_room(0, 1, &given, NULL, 0, &length));
    CHECK(given == 0 && length == 0);
    EXPECT(SIRE_STATUS_OUT_OF_DEVICE_MEMORY, sire_make_room(0, (size_t)1 << 60, NULL, NULL, 0, NULL));
    CHECK(sire_make_room(-1, 1, NULL, NULL, 0, NULL) != SIRE_STATUS_OK);
    sire_reservation *reservation = NULL;
    sire_reserve_options reserve = {sizeof reserve, 1 << 21, 0, 0.0, 2, "/nonexistent-directory", 0, 0};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reserve(0, NULL, &reservation));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reserve(0, &reserve, NULL));
    EXPECT(SIRE_STATUS_UNSUPPORTED, sire_reserve(0, &reserve, &reservation));
    SAYS("/nonexistent-directory");
    reserve.fence = 3;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reserve(0, &reserve, &reservation));
    reserve.fence = 0;
    reserve.timeout_seconds = -1.0;
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reserve(0, &reserve, &reservation));
    SAYS("timeout_seconds");
    CHECK(sire_reserve(-1, &reserve, &reservation) != SIRE_STATUS_OK);
    CHECK(reservation == NULL);
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reservation_resize(NULL, 1, 0.0, 0));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reservation_note_owned(NULL, 1));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reservation_get(NULL, NULL));
    OK(sire_reservation_release(NULL));
    sire_reserve_options whole = {sizeof whole, 0, 0, 0.0, 0, "/tmp", 1, 0};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reserve(0, &whole, &reservation));
    SAYS("nobody can give way for a whole device");
    uint64_t mark = 7;
    sire_reclaimable_options terms = {sizeof terms, 0, 0, 0, 0, -1.0};
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reclaimable_open("bad", &terms, &mark));
    SAYS("after_idle_seconds");
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reclaimable_open("bad", NULL, NULL));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reclaimable_open(NULL, NULL, &mark));
    CHECK(mark == 7);
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reclaimable_used(12345, 0.0));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_reclaimable_used(12345, -1.0));
    OK(sire_reclaimable_close(12345, NULL, NULL));
    OK(sire_reclaimable_json(NULL, 0, NULL));
    CHECK(sire_reservations_json(-1, "/tmp", NULL, 0, &length) != SIRE_STATUS_OK);
    OK(sire_pause("bad", NULL, NULL));
    OK(sire_pause("bad", NULL, NULL));
    EXPECT(SIRE_STATUS_PAUSED, sire_region_enter(region, 0));
    SAYS("bad");
    OK(sire_region_enter(region, 1));
    CHECK(holds(ours, 3 * MiB, 5));
    EXPECT(SIRE_STATUS_INVALID_ARGUMENT, sire_allocate(0, 0, NULL, &foreign));
    CHECK(sire_allocate(16, 77, NULL, &foreign) != SIRE_STATUS_OK);
    CHECK(sire_allocate(16, -1, NULL, &foreign) != SIRE_STATUS_OK);
    CHECK(sire_allocate(SIZE_MAX, 0, NULL, &foreign) != SIRE_STATUS_OK);
    CHECK(cudaMalloc(&foreign, SIZE_MAX - 5) == 2);
    OK(sire_region_leave(region));
    CUDA(0, cudaFree(ours));
    /* Twice is an error, of CUDA's or of ours, and nothing worse. */
    CHECK(cudaFree(ours) != 0);
    CHECK(sire_free(ours) != SIRE_STATUS_OK);
    cudaGetLastError();
}

static void messages(void) {
    EXPECT(SIRE_STATUS_UNKNOWN_TAG, sire_pause("a tag that nobody opened", NULL, NULL));
    char small[8], whole[1024];
    size_t length = sire_last_error(whole, sizeof whole);
    CHECK(length == strlen(whole) && length > sizeof small);
    CHECK(sire_last_error(small, sizeof small) == length && strlen(small) == 7 && !strncmp(small, whole, 7));
    char untouched = 'x';
    CHECK(sire_last_error(&untouched, 0) == length && untouched == 'x');
    CHECK(!strcmp(sire_status_name(0), "SIRE_STATUS_OK") && !strcmp(sire_status_name(18), "SIRE_STATUS_INTERNAL"));
    CHECK(!strcmp(sire_status_name(19), "SIRE_STATUS_UNKNOWN") && !strcmp(sire_status_name(-1), "SIRE_STATUS_UNKNOWN"));
    CHECK(sire_abi_version() == 1 && strlen(sire_build_id()) == 16 && strchr(sire_version(), '.'));
    size_t json = 0;
    OK(sire_stats_json(small, sizeof small, &json));
    CHECK(small[0] == '{' && strlen(small) == 7 && json > 100);
}

int main(void) {
    region = region_of("bad", 1);
    void *witness = allocate_in(region_of("witness", 1), 2 * MiB);
    fill(witness, 2 * MiB, 42);
    nulls();
    tags();
    structs();
    regions();
    pointers();
    messages();
    OK(sire_pause(NULL, NULL, NULL));
    OK(sire_resume(NULL, NULL, NULL));
    CHECK(holds(witness, 2 * MiB, 42));
    CUDA(0, cudaFree(witness));
    OK(sire_trim(NULL, NULL));
    CHECK(device_used(0) == 0);
    return 0;
}
