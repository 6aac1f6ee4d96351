// A library that has every function of the C interface and does nothing: for tests of finding, loading and
// refusing the real one. Compiled with -DBUILD_ID=... -DVERSION=... -DABI=... and, without a function, -DINCOMPLETE.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef BUILD_ID
#define BUILD_ID "0123456789abcdef"
#endif
#ifndef VERSION
#define VERSION "0.1.0"
#endif
#ifndef ABI
#define ABI 1
#endif

uint32_t sire_abi_version(void) { return ABI; }
const char *sire_version(void) { return VERSION; }
const char *sire_build_id(void) { return BUILD_ID; }
bool sire_owns(const void *pointer) { (void)pointer; return false; }

static const char message[] = "the stand-in refuses";
size_t sire_last_error(char *buffer, size_t capacity) {
    if (capacity > 0) {
        strncpy(buffer, message, capacity - 1);
        buffer[capacity - 1] = 0;
    }
    return sizeof message - 1;
}

// Live where a process looks this name up and finds this file: where it is preloaded.
int cudaMalloc(void **out, size_t bytes) { (void)out; (void)bytes; return 2; }
int32_t sire_hook_probe(int32_t *live) { *live = dlsym(dlopen(NULL, RTLD_NOW), "cudaMalloc") == (void *)cudaMalloc; return 0; }

int32_t sire_driver_hook_probe(int32_t *live) { *live = 0; return 0; }

int32_t sire_region_open(const char *tag, const void *options, uint32_t *region) { (void)tag; (void)options; *region = 7; return 0; }
int32_t sire_pause(const char *tag, const void *options, void *report) { (void)options; (void)report; return tag ? 4 : 0; }

static const char stats[] = "{\"version\": \"" VERSION "\", \"regions\": []}";
int32_t sire_stats_json(char *buffer, size_t capacity, size_t *length) {
    if (capacity > 0) {
        strncpy(buffer, stats, capacity - 1);
        buffer[capacity - 1] = 0;
    }
    *length = sizeof stats - 1;
    return 0;
}

#define NOTHING(name) int32_t name(void) { return 0; }
NOTHING(sire_region_enter) NOTHING(sire_region_enter_on) NOTHING(sire_region_leave) NOTHING(sire_region_current) NOTHING(sire_region_suspend)
NOTHING(sire_region_unsuspend) NOTHING(sire_process_region_set) NOTHING(sire_region_state) NOTHING(sire_allocate)
NOTHING(sire_free) NOTHING(sire_allocation) NOTHING(sire_keep) NOTHING(sire_discard) NOTHING(sire_backup_get)
NOTHING(sire_backup_put) NOTHING(sire_resume) NOTHING(sire_cancel) NOTHING(sire_allow_peer) NOTHING(sire_set_margin)
NOTHING(sire_set_disk_directory) NOTHING(sire_trim) NOTHING(sire_capture_begin) NOTHING(sire_changed) NOTHING(sire_attach_file) NOTHING(sire_promote) NOTHING(sire_keep_resident) NOTHING(sire_require_usable)
NOTHING(sire_control_open) NOTHING(sire_control_close) NOTHING(sire_control_give_up) NOTHING(sire_control_wait) NOTHING(sire_control_publish)
NOTHING(sire_safe_point) NOTHING(sire_safe_point_leave)
NOTHING(sire_switch) NOTHING(sire_standing_set) NOTHING(sire_lease) NOTHING(sire_unlease) NOTHING(sire_budget_set) NOTHING(sire_budget_get) NOTHING(sire_make_room)
NOTHING(sire_reserve) NOTHING(sire_reservation_resize) NOTHING(sire_reservation_note_owned) NOTHING(sire_reservation_get)
NOTHING(sire_reservation_release) NOTHING(sire_reservations_json)
NOTHING(sire_reclaimable_open) NOTHING(sire_reclaimable_used) NOTHING(sire_reclaimable_close) NOTHING(sire_reclaimable_json)
NOTHING(sire_time_slice_open) NOTHING(sire_time_slice_close) NOTHING(sire_time_slice_json)
NOTHING(sire_memory_stats_json) NOTHING(sire_memory_snapshot_json) NOTHING(sire_memory_stats_reset) NOTHING(sire_empty_cache)
NOTHING(sire_resume_start) NOTHING(sire_progress_bytes) NOTHING(sire_progress_cancel) NOTHING(sire_progress_close)
NOTHING(sire_progress_ready) NOTHING(sire_progress_report) NOTHING(sire_progress_wait) NOTHING(sire_progress_wait_stream) NOTHING(sire_pre_copy)
#ifndef INCOMPLETE
NOTHING(sire_capture_end)
#endif
