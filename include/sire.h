/* The C interface of libsire_alloc.so. Generated from cdylib/ by build.rs; docs/abi.md says how to read it.
 * SPDX-License-Identifier: MIT OR Apache-2.0 */

#ifndef SIRE_H
#define SIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// What a function returns. The numbers never change and are never reused.
enum sire_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // It worked.
  SIRE_STATUS_OK = 0,
  // An argument is outside what the function accepts.
  SIRE_STATUS_INVALID_ARGUMENT = 1,
  // Not enough physical memory on the device; nothing was lost, and the call can be repeated.
  SIRE_STATUS_OUT_OF_DEVICE_MEMORY = 2,
  // Not enough room for backups (host limit, cgroup, disk); nothing was lost.
  SIRE_STATUS_OUT_OF_BACKUP_SPACE = 3,
  // No region has this tag.
  SIRE_STATUS_UNKNOWN_TAG = 4,
  // The address is not an allocation of Sire's.
  SIRE_STATUS_UNKNOWN_ADDRESS = 5,
  // The region is paused, and the call needs it resident.
  SIRE_STATUS_PAUSED = 6,
  // The region is in use: a thread is inside it, or another transition runs.
  SIRE_STATUS_BUSY = 7,
  // A graph capture is in progress: Sire must not synchronise now.
  SIRE_STATUS_CAPTURING = 8,
  // The call was cancelled and rolled back.
  SIRE_STATUS_CANCELLED = 9,
  // Reading or writing a backup failed; what the message names is still safe elsewhere.
  SIRE_STATUS_BACKUP_IO = 10,
  // There is no usable driver or device.
  SIRE_STATUS_NO_DRIVER = 11,
  // The environment cannot be served (for example memory of two regions in one segment of PyTorch's).
  SIRE_STATUS_UNSUPPORTED = 12,
  // The device context is lost; only a new process helps.
  SIRE_STATUS_DEVICE_LOST = 13,
  // The driver failed in another way.
  SIRE_STATUS_DRIVER = 14,
  // The library is not active in this process (forked child, `SIRE_DISABLE`).
  SIRE_STATUS_INACTIVE = 15,
  // The caller was built for another version of the library.
  SIRE_STATUS_VERSION_MISMATCH = 16,
  // A transition could not be undone; the tag ended paused with every byte in a backup.
  SIRE_STATUS_PAUSED_AFTER_FAILURE = 17,
  // A bug in Sire (a caught panic). Nothing is known about the call's effect.
  SIRE_STATUS_INTERNAL = 18,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum sire_status sire_status;
#else
typedef int32_t sire_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// A resume that goes on in the background. Every function that takes one may be called from any thread.
typedef struct sire_progress sire_progress;

// A reservation. Every function that takes one may be called from any thread.
typedef struct sire_reservation sire_reservation;

// What a region promises about its content. Set `struct_size` to `sizeof(sire_region_options)`.
typedef struct sire_region_options {
  // `sizeof(sire_region_options)`.
  size_t struct_size;
  // Where the content goes while the region is paused: 0 nowhere, 1 host memory, 2 disk, 3 a file that was
  // attached (host memory for the rest), 4 chosen by the engine: such a file for what it
  // holds, else host memory, the disk for what it has no room for.
  int32_t backup;
  // Bytes that were not backed up read as zero after resume.
  bool zero_fill;
  // The backup's space stays allocated after resume.
  bool retain;
  // Whether the backup of an earlier pause may stand for content that has not changed since: 0 no, every pause copies;
  // 1 declared: the program does not write to what was backed up, or says so with `sire_changed`; 2 verified: a 128-bit hash of
  // each page decides; 3 paranoid: each page is compared. Anything but 0 needs a backup, and retains it.
  int32_t clean;
  // The backup's host memory is left pageable: it does not count against what the process may lock, but copies are slower.
  bool pageable;
  // Each allocation of 1 MiB (`SIRE_SMALL`) and more is one piece of physical memory, whatever its size, so that one handle stands for all of it: for
  // buffers that libraries register with others (docs/outside.md).
  bool whole;
} sire_region_options;

// Memory `[start, start + bytes)`. The one struct without a size of its own: it comes in arrays, and never changes.
typedef struct sire_range {
  // The first byte.
  const void *start;
  // How many.
  size_t bytes;
} sire_range;

// Says which memory of `regions` (`count` of them) holds nothing, such as the free blocks of the program's own allocator: it
// is neither copied nor restored. Called once by `sire_pause`, in its thread, when the regions are closed and before
// anything is planned; may free memory of the regions, may not pause or resume. The ranges stay the caller's, and
// must live until `sire_pause` returns; those outside the regions are ignored. Anything but `SIRE_STATUS_OK` makes the pause
// fail with that status, and nothing has changed.
typedef int32_t (*sire_dead_ranges)(void *context,
                                    const uint32_t *regions,
                                    size_t count,
                                    const struct sire_range **out_ranges,
                                    size_t *out_count);

// Settings of a pause. Set `struct_size` to `sizeof(sire_pause_options)`.
typedef struct sire_pause_options {
  // `sizeof(sire_pause_options)`.
  size_t struct_size;
  // Who knows which memory of the paused regions holds nothing; NULL: all of it counts.
  sire_dead_ranges dead_ranges;
  // Passed to `dead_ranges`.
  void *dead_ranges_context;
  // When physical memory goes back to the driver. 0: now. 1: when somebody needs it, that is when an allocation or a resume of this process
  // finds no room, with `sire_trim`, or when the tag is paused again with 0; a resume before that copies nothing and calls no driver. Other
  // processes cannot have the memory until then.
  int32_t release;
  // 1: the caller vouches that no work that a device was given uses the memory any more, which then is not waited for, and what else the
  // devices do goes on. 0: the devices are waited for.
  uint64_t idle;
  // 1: only regions of the tag itself are meant. 0: what is under it as well.
  uint64_t alone;
} sire_pause_options;

// What a pause or a resume did. Bytes are device bytes, times wall-clock seconds. Set `struct_size` before the call.
typedef struct sire_report {
  // `sizeof(sire_report)`.
  size_t struct_size;
  // Regions whose state the call changed.
  uint32_t regions_changed;
  // Regions that were already in the wanted state.
  uint32_t regions_unchanged;
  // Allocations in the changed regions.
  uint64_t allocations;
  // Physical bytes that the changed regions hold when resident.
  uint64_t bytes_expected;
  // Physical bytes given back to, or taken from, the driver.
  uint64_t bytes_moved;
  // Bytes copied to or from backups.
  uint64_t bytes_copied;
  // Bytes whose content was thrown away.
  uint64_t bytes_discarded;
  // Bytes filled with zeros.
  uint64_t bytes_zeroed;
  // Finding, checking, reserving room for backups.
  double seconds_prepare;
  // Waiting for the devices.
  double seconds_synchronize;
  // Copies and virtual-memory calls, overlapped.
  double seconds_transfer;
  // The whole call.
  double seconds_total;
  // Bytes that the program's own allocator holds free (`dead_ranges`): neither copied nor counted as discarded.
  uint64_t bytes_dead;
  // Bytes that an earlier pause had backed up and that had not changed: nothing was copied.
  uint64_t bytes_clean;
  // Bytes that were hashed or compared to find out.
  uint64_t bytes_hashed;
  // Bytes that repeat one 8-byte pattern and need no room in a backup.
  uint64_t bytes_constant;
  // Bytes that another backup of this process has already, and that share its room.
  uint64_t bytes_shared;
  // Physical bytes that changed hands within a switch, without the driver.
  uint64_t bytes_recycled;
  // Physical bytes that stay until somebody needs them (`sire_pause_options.release`).
  uint64_t bytes_lazy;
  // Physical bytes that stay because the program has handed them out, or keeps them resident; `held` in the statistics says why.
  uint64_t bytes_held;
} sire_report;

// Settings of a resume. Set `struct_size` to `sizeof(sire_resume_options)`.
typedef struct sire_resume_options {
  // `sizeof(sire_resume_options)`.
  size_t struct_size;
  // How long to wait for device memory that somebody else still holds, in seconds.
  double wait_seconds;
  // Memory in the order in which it is to come back, chunk by chunk; what is not named comes last. NULL: no wish.
  const struct sire_range *order;
  // How many.
  size_t order_count;
  // 1: only regions of the tag itself are meant. 0: what is under it as well.
  uint64_t alone;
} sire_resume_options;

// What a program says about a region beside its policy. Set `struct_size` to `sizeof(sire_standing)`.
typedef struct sire_standing {
  // `sizeof(sire_standing)`.
  size_t struct_size;
  // Regions of a higher one make way later; 0 if nobody said anything.
  int32_t priority;
  // It does not make way at all.
  bool pinned;
  // For how long after its last use it makes way only when nobody else is left, in seconds.
  double keep_alive_seconds;
} sire_standing;

// What `sire_make_room` may use of a device. Set `struct_size` to `sizeof(sire_budget)`.
typedef struct sire_budget {
  // `sizeof(sire_budget)`.
  size_t struct_size;
  // The most that regions may hold; 0: what there is.
  uint64_t limit_bytes;
  // What stays free for others.
  uint64_t headroom_bytes;
  // For how long after its last use every region is spared while another is left, in seconds.
  double residency_seconds;
} sire_budget;

// How to reserve. Set `struct_size` to `sizeof(sire_reserve_options)`; zeros mean: the whole device, only if it can be had at once, with no fence.
typedef struct sire_reserve_options {
  // `sizeof(sire_reserve_options)`.
  size_t struct_size;
  // Bytes to reserve. 0: the device for this process alone: once nobody has reserved anything there, all that is free but `margin_bytes`.
  uint64_t bytes;
  // With `bytes` 0: what stays free.
  uint64_t margin_bytes;
  // How long to wait in the queue, in seconds (INFINITY: for as long as it takes).
  double timeout_seconds;
  // 0: only the ledger says whose the bytes are. 1: the process also takes them from the driver at once, so that nobody at all can have
  // them; where that is not possible, the ledger alone does, and the log says so. 2: where it is not possible, reserving fails.
  int32_t fence;
  // Where processes find each other's ledgers; NULL: `TORCHTOOLS_LOCK_DIR`, or else `/tmp`.
  const char *directory;
  // Not 0: while it waits, and it is its turn, other processes of the same user are asked to give way with what they have marked for that
  // (`sire_reclaimable_open`), and get it back when the reservation ends. Not with `bytes` 0.
  int32_t preempt;
  // With `preempt`: marks of at most this priority give way.
  int32_t priority;
} sire_reserve_options;

// What a reservation is. Set `struct_size` to `sizeof(sire_reservation_report)`.
typedef struct sire_reservation_report {
  // `sizeof(sire_reservation_report)`.
  size_t struct_size;
  // Bytes that the ledger says are ours.
  uint64_t reserved_bytes;
  // Of those, bytes that the process has taken from the driver (whole granules: it may be somewhat more).
  uint64_t fenced_bytes;
  // Of the fences of all this process's reservations on the device, bytes that nothing uses yet.
  uint64_t unused_bytes;
} sire_reservation_report;

// On which terms memory gives way. Set `struct_size` to `sizeof(sire_reclaimable_options)`; zeros mean: to every need of priority 0 and above, whenever the
// program passes a safe point; the program waits there until the need is over, and the memory comes back by itself.
typedef struct sire_reclaimable_options {
  // `sizeof(sire_reclaimable_options)`.
  size_t struct_size;
  // Needs of this priority and above.
  int32_t priority;
  // Not 0: it stays away until the program resumes it itself, and nobody waits for it at safe points.
  int32_t stay_away;
  // Not 0: threads that pass safe points go on meanwhile. The program uses nothing of it then before it has resumed it, or found that it is back.
  int32_t go_on;
  // Not 0: also regions without a backup, whose content is lost by that.
  int32_t discard;
  // Seconds for which it must not have been used.
  double after_idle_seconds;
} sire_reclaimable_options;

// Told in the calling thread what happens to a tag (NULL: everything) at its safe point. `what` 0: it is about to be paused; anything but
// `SIRE_STATUS_OK` refuses that. 1: it was resumed. 2: it was not paused after all.
typedef int32_t (*sire_told)(void *context, int32_t what, const char *tag);

// How to take turns. Set `struct_size` to `sizeof(sire_time_slice_options)`.
typedef struct sire_time_slice_options {
  // `sizeof(sire_time_slice_options)`.
  size_t struct_size;
  // How long a turn lasts at least, in seconds, more than 0.
  double quantum_seconds;
  // How long to wait for the first turn, in seconds (INFINITY: for as long as it takes; 0: only if it can be had at once).
  double timeout_seconds;
  // Processes of the same group take turns; NULL: the group without a name.
  const char *group;
  // Where processes find each other; NULL: `TORCHTOOLS_LOCK_DIR`, or else `/tmp`.
  const char *directory;
} sire_time_slice_options;

// Settings of a safe point. Set `struct_size` to `sizeof(sire_safe_point_options)`.
typedef struct sire_safe_point_options {
  // `sizeof(sire_safe_point_options)`.
  size_t struct_size;
  // As in `sire_pause_options`.
  sire_dead_ranges dead_ranges;
  // Passed to `dead_ranges`.
  void *dead_ranges_context;
  // Who wants to be told; NULL: nobody.
  sire_told told;
  // Passed to `told`.
  void *told_context;
  // How long the thread may be kept, in seconds; 0: for as long as it takes.
  double slice_seconds;
} sire_safe_point_options;

// PyTorch's name of a private pool (`c10::cuda::MempoolId_t`).
typedef struct sire_torch_pool_id {
  // Its first half.
  uint64_t first;
  // Its second half.
  uint64_t second;
} sire_torch_pool_id;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The number of this interface: it changes only when something in it breaks.
uint32_t sire_abi_version(void);

// The library's version, such as "0.1.0".
const char *sire_version(void);

// 16 hex digits: a hash of the sources that this library was built from.
const char *sire_build_id(void);

// The constant's name, such as "SIRE_STATUS_OK"; "SIRE_STATUS_UNKNOWN" for a number that is none.
const char *sire_status_name(int32_t status);

// The message of this thread's last failure. At most `cap` bytes are written, always NUL-terminated; returns the
// full length without the NUL.
//
// What the caller sees to:
// `buf` is NULL or has room for `cap` bytes.
size_t sire_last_error(char *buf, size_t cap);

// Whether the address lies in memory of Sire's, resident or paused. Wait-free.
bool sire_owns(const void *ptr);

// The region of (tag, options), made if there is none. Tags are paths of `/`-separated segments, at most 255 bytes:
// pausing "model" pauses "model/weights" too. Options NULL: content is thrown away by a pause.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated, `options` NULL or a sized struct, `out_region` NULL or writable.
sire_status sire_region_open(const char *tag, const struct sire_region_options *options, uint32_t *out_region);

// This thread goes inside the region: what it allocates belongs to it, and it cannot be paused until the thread leaves.
// Nests. If the region is paused: `on_paused` 0 refuses (`SIRE_STATUS_PAUSED`), 1 resumes it first.
sire_status sire_region_enter(uint32_t region, int32_t on_paused);

// As `sire_region_enter`, for what the thread allocates on one device (an ordinal; -1: on every device). What it allocates on another belongs to the
// next region outside that takes it. For programs whose allocator keeps what it was given and hands it out again by device, as PyTorch's pools do: what
// such an allocator takes for a device whose pool is not the region's is not the region's memory.
sire_status sire_region_enter_on(uint32_t region,
                                 int32_t device,
                                 int32_t on_paused);

// This thread leaves the region, which must be its innermost one.
sire_status sire_region_leave(uint32_t region);

// The region of this thread's next allocation: the innermost, else the process-wide one; `UINT32_MAX`: none.
//
// What the caller sees to:
// `out_region` is NULL or writable.
sire_status sire_region_current(uint32_t *out_region);

// This thread's allocations pass through, whatever region it is in, until as many `sire_region_unsuspend`.
sire_status sire_region_suspend(void);

// Undoes one `sire_region_suspend` of this thread.
sire_status sire_region_unsuspend(void);

// The region of threads that are in none; `UINT32_MAX`: they pass through.
sire_status sire_process_region_set(uint32_t region);

// Whether the region is resident (0) or paused (1).
//
// What the caller sees to:
// `out_state` is NULL or writable.
sire_status sire_region_state(uint32_t region, int32_t *out_state);

// Allocates in this thread's region, of those that take the device's memory the innermost; an error outside one. `stream`: where the memory will first be used.
//
// What the caller sees to:
// `out` is NULL or writable.
sire_status sire_allocate(size_t bytes,
                          int32_t device,
                          void *stream,
                          void **out);

// Frees an allocation of Sire's, resident or paused. NULL is nothing to do.
sire_status sire_free(void *ptr);

// The allocation that holds an address.
//
// What the caller sees to:
// Every output is NULL or writable.
sire_status sire_allocation(const void *ptr,
                            void **out_base,
                            size_t *out_bytes,
                            int32_t *out_device,
                            uint32_t *out_region);

// Whether the memory at an address may be used now: `SIRE_STATUS_PAUSED` while its region is paused or being paused (the sentence names it), unless it is memory that
// pauses leave on the device; `SIRE_STATUS_UNKNOWN_ADDRESS` if no live allocation of Sire's holds it. Calls no driver, and waits for nobody.
sire_status sire_require_usable(const void *ptr);

// These bytes are backed up by a pause, whatever their region's policy.
sire_status sire_keep(const void *ptr, size_t bytes);

// These bytes are thrown away by a pause, whatever their region's policy.
sire_status sire_discard(const void *ptr, size_t bytes);

// The program has written to these bytes of a region whose content is declared not to change (`clean` 1): the next pause
// copies them again.
sire_status sire_changed(const void *ptr,
                         size_t bytes);

// The file at `path` holds these bytes, from byte `offset` on. The next pause compares them: what is equal is backed up nowhere else, and
// read from the file by the resume; the rest goes to host memory, or with `backup` 4 where the engine chooses. The range lies inside one allocation of a
// region with `backup` 3 or 4.
// The file may be renamed or removed afterwards, but must not be written to while the region is paused: a resume that meets other bytes fails, with the
// region paused as before, and works again when the file is as it was.
//
// What the caller sees to:
// `path` is NULL or NUL-terminated.
sire_status sire_attach_file(const void *ptr,
                             size_t bytes,
                             const char *path,
                             uint64_t offset);

// From now on no pause takes the allocation that holds `ptr`, until it is freed: it stays on the device while the rest of its region
// goes. A small one takes its neighbours with it. Its bytes go to `out_bytes`.
//
// What the caller sees to:
// `out_bytes` is NULL or writable.
sire_status sire_keep_resident(const void *ptr,
                               size_t *out_bytes);

// The host backup of a range inside one allocation; `SIRE_STATUS_UNKNOWN_ADDRESS` if there is none. `*out_data` can be
// read until `sire_backup_put(*out_token)`.
//
// What the caller sees to:
// Both outputs are NULL or writable.
sire_status sire_backup_get(const void *ptr, size_t bytes, const void **out_data, void **out_token);

// Gives a backup's data back. NULL is nothing to do.
//
// What the caller sees to:
// `token` is NULL or came from `sire_backup_get` and was not given back yet.
sire_status sire_backup_put(void *token);

// What the cache of a device counts, as a JSON object with the names and meanings of `torch.cuda.memory_stats`
// (`"allocated_bytes.all.current"`, ...). A text output: call with `cap` 0 to measure.
//
// What the caller sees to:
// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_memory_stats_json(int32_t device, char *buf, size_t cap, size_t *out_len);

// Every segment and block of the caches of all devices, as a JSON list in the shape of `torch.cuda.memory_snapshot`; each segment also has
// the `tag` of its region. A text output: call with `cap` 0 to measure.
//
// What the caller sees to:
// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_memory_snapshot_json(char *buf,
                                      size_t cap,
                                      size_t *out_len);

// The peaks of a device's cache are from now on what there is now; with `accumulated`, what has come and gone is counted anew instead.
sire_status sire_memory_stats_reset(int32_t device,
                                    bool accumulated);

// Gives the driver what caches hold free; how many bytes goes to `out_bytes`. `SIRE_STATUS_CAPTURING` during a capture.
//
// What the caller sees to:
// `out_bytes` is NULL or writable.
sire_status sire_empty_cache(size_t *out_bytes);

// Brings automatic backups (`backup` 4) of the tag and what is under it (NULL: everything) from the disk back into host memory, as far as
// there is room, so that a resume is fast. Changes nothing else. Output: bytes that moved.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated; `out_bytes` is NULL or writable.
sire_status sire_promote(const char *tag,
                         size_t *out_bytes);

// Pauses the tag and what is under it (NULL: everything): content goes where the regions' policies say, physical memory goes
// back to the driver, addresses stay. All or nothing. Pausing what is paused changes nothing.
//
// Whoever pauses everything, or a process-wide region, sees to it that nothing uses the memory meanwhile: no thread of the
// program submits work on it. Threads inside a region are found and refused; those under a process-wide one are not.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated; `options` and `out` are NULL or sized structs.
sire_status sire_pause(const char *tag,
                       const struct sire_pause_options *options,
                       struct sire_report *out);

// Backs up what the tag and what is under it (NULL: everything) hold, while the program goes on using it: a later pause copies only what has
// changed since. For regions opened with a `clean` policy; a region that keeps its content without one is refused
// (`SIRE_STATUS_INVALID_ARGUMENT`), because nothing would tell what has changed. Regions that are paused, and those that keep nothing, are left out.
//
// Each device is waited for once, before the first copy: all work that it was given before this call is in the backup. What is written
// afterwards is found by the pause; where the content is declared not to change, the backup made here counts as the first one, and later
// writes must be told with `sire_changed`. Memory may be allocated and freed meanwhile; a pause that comes meanwhile goes first.
// `regions_changed` counts the regions that were looked at. If the call fails (no room, cancelled), what was copied before stays.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated; `out` is NULL or a sized struct.
sire_status sire_pre_copy(const char *tag,
                          struct sire_report *out);

// Resumes the tag and what is under it (NULL: everything): memory and content come back to the same addresses. All or
// nothing; after a failure every backup is still there, and the call can be repeated.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated; `options` and `out` are NULL or sized structs.
sire_status sire_resume(const char *tag, const struct sire_resume_options *options, struct sire_report *out);

// Pauses one tag and resumes another, in one call: both, or neither. Content travels in both directions at once, and memory goes from the
// one to the other, so that the device never needs more than it has. `options`: about what is paused; its memory goes now. If the undo of a failure fails too,
// both are paused (`SIRE_STATUS_PAUSED_AFTER_FAILURE`), and nothing is lost.
//
// What the caller sees to:
// The tags are NUL-terminated; `options` and the outputs are NULL or sized structs.
sire_status sire_switch(const char *pause,
                        const char *resume,
                        const struct sire_pause_options *options,
                        struct sire_report *out_pause,
                        struct sire_report *out_resume);

// Makes a running pause, resume or pre-copy stop at the next chunk and roll back. Async-signal-safe.
sire_status sire_cancel(void);

// Starts to resume the tag and what is under it (NULL: everything), and returns. What can be refused at once is; everything else
// `*out_progress` tells, which must be closed. Memory can be used as soon as it is ready; nothing is before all of it has been
// taken from the driver. Until the resume is over nobody can enter its regions. If it fails, they are paused, what was ready stays until the next
// pause or resume, and the call can be repeated. `sire_cancel` does not concern it.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated; `options` is NULL or a sized struct; `out_progress` is writable.
sire_status sire_resume_start(const char *tag,
                              const struct sire_resume_options *options,
                              struct sire_progress **out_progress);

// Whether these bytes can be used now. Memory that the resume does not concern counts as ready. Never blocks.
//
// What the caller sees to:
// `progress` is open; `out_ready` is NULL or writable.
sire_status sire_progress_ready(const struct sire_progress *progress, const void *ptr, size_t bytes, bool *out_ready);

// Waits until these bytes can be used, or, with `ptr` NULL, until the resume is over; at most `timeout_seconds` (INFINITY: for as long as it
// takes). `*out_ready`: whether it came to that. Fails as the resume did, if it ended before.
//
// What the caller sees to:
// `progress` is open, also while others wait; `out_ready` is NULL or writable.
sire_status sire_progress_wait(const struct sire_progress *progress,
                               const void *ptr,
                               size_t bytes,
                               double timeout_seconds,
                               bool *out_ready);

// Has `stream` of `device` wait for these bytes, or, with `ptr` NULL, for all that the resume brings back: what is put there from now on finds them. The
// caller waits only until the copies that bring them are queued, at most `timeout_seconds` (as in `sire_progress_wait`); `*out_queued`: whether it came to
// that. For a stream that captures a graph the caller waits until the bytes have arrived. Fails as the resume did, if it ended before.
//
// What the caller sees to:
// `progress` is open, also while others wait; `stream` is a stream of the device, which nobody destroys meanwhile; `out_queued` is NULL or writable.
sire_status sire_progress_wait_stream(const struct sire_progress *progress,
                                      const void *ptr,
                                      size_t bytes,
                                      int32_t device,
                                      void *stream,
                                      double timeout_seconds,
                                      bool *out_queued);

// What the resume did; `SIRE_STATUS_BUSY` while it is not over, and its own failure if it failed.
//
// What the caller sees to:
// `progress` is open; `out` is NULL or a sized struct.
sire_status sire_progress_report(const struct sire_progress *progress, struct sire_report *out);

// Bytes of device memory that can be used already, and that the resume brings back altogether.
//
// What the caller sees to:
// `progress` is open; the outputs are NULL or writable.
sire_status sire_progress_bytes(const struct sire_progress *progress, uint64_t *out_ready, uint64_t *out_total);

// Makes the resume stop at the next chunk. What is ready stays; its regions end paused, unless everything was ready.
//
// What the caller sees to:
// `progress` is open.
sire_status sire_progress_cancel(const struct sire_progress *progress);

// Nobody asks any more; the resume goes on. NULL is nothing to do.
//
// What the caller sees to:
// `progress` is NULL or open, and no other thread is using it.
sire_status sire_progress_close(struct sire_progress *progress);

// What is said about the tag and what is under it (NULL: everything) from now on.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated, `standing` NULL or a sized struct.
sire_status sire_standing_set(const char *tag, const struct sire_standing *standing);

// Somebody uses the tag and what is under it (NULL: everything): until as many `sire_unlease` these regions do not make way for others. A pause
// by name is not refused.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated.
sire_status sire_lease(const char *tag);

// Undoes one `sire_lease` of the same tag; the regions count as used now.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated.
sire_status sire_unlease(const char *tag);

// What `sire_make_room` may use of a device from now on, and for how long everybody spares what was just used.
//
// What the caller sees to:
// `budget` is NULL or a sized struct.
sire_status sire_budget_set(int32_t device, const struct sire_budget *budget);

// What was said of a device last, by `sire_budget_set` or from outside (`sire budget`); zeros if nobody has said anything.
//
// What the caller sees to:
// `out` is NULL or a sized struct that is writable.
sire_status sire_budget_get(int32_t device,
                            struct sire_budget *out);

// Makes room for `bytes` more on a device, within its budget: regions that were paused with `release` 1 and that nobody uses give their memory back,
// those of low priority and those used least recently first, no more than necessary. Nothing is copied.
// `SIRE_STATUS_OUT_OF_DEVICE_MEMORY` if that would not be enough: then nobody gave anything. `buf` gets the tags, one in each line.
//
// What the caller sees to:
// `out_bytes` is NULL or writable; `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_make_room(int32_t device,
                           size_t bytes,
                           size_t *out_bytes,
                           char *buf,
                           size_t cap,
                           size_t *out_len);

// Reserves bytes of a device among all processes of the machine that do so, of whatever user: waits for its turn (who came first is served
// first) and for room. It lasts until `sire_reservation_release`, or the end of this process, however it ends. `SIRE_STATUS_BUSY` if it was not to
// be had in time, `SIRE_STATUS_OUT_OF_DEVICE_MEMORY` if the device does not have so much (or the fence could not be built),
// `SIRE_STATUS_UNSUPPORTED` if the ledger cannot be used; `sire_cancel` ends the wait.
//
// What the caller sees to:
// `options` is a sized struct whose strings are NULL or NUL-terminated; `out_reservation` is writable.
sire_status sire_reserve(int32_t device,
                         const struct sire_reserve_options *options,
                         struct sire_reservation **out_reservation);

// Makes a reservation `bytes` (more than 0) in all. For more it waits as `sire_reserve` does, and keeps what it has meanwhile and afterwards.
//
// What the caller sees to:
// `reservation` was not released yet.
sire_status sire_reservation_resize(const struct sire_reservation *reservation,
                                    uint64_t bytes,
                                    double timeout_seconds,
                                    int32_t fence);

// Says how many of a reservation's bytes this process owns by other means than the fence, so that others do not count them twice. More is to be
// said after it was allocated, less before it is given back.
//
// What the caller sees to:
// `reservation` was not released yet.
sire_status sire_reservation_note_owned(const struct sire_reservation *reservation,
                                        uint64_t bytes);

// What a reservation is now.
//
// What the caller sees to:
// `reservation` was not released yet; `out` is NULL or a sized struct.
sire_status sire_reservation_get(const struct sire_reservation *reservation, struct sire_reservation_report *out);

// Ends a reservation: first in the ledger, then what of its fence nothing uses goes back to the driver. NULL is nothing to do.
//
// What the caller sees to:
// `reservation` is NULL or was not released yet, and no other thread is using it.
sire_status sire_reservation_release(struct sire_reservation *reservation);

// A device's UUID, and everybody in its ledger, as JSON (docs/reservations.md). `directory` as in the options. A text
// output: call with `cap` 0 to measure.
//
// What the caller sees to:
// `directory` is NULL or NUL-terminated; `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_reservations_json(int32_t device, const char *directory, char *buf, size_t cap, size_t *out_len);

// From now on the memory of a tag, and of what is under it, gives way when another process of the same user needs it, waits for it with
// `sire_reserve_options.preempt`, and finds nothing free: at a safe point of the program (`sire_safe_point`), backed up as its regions' policies say. When
// the needer ends, however, it comes back at a safe point, as soon as there is room. Opens the control socket, unless `SIRE_CONTROL` forbids that
// (`SIRE_STATUS_UNSUPPORTED`). `options` NULL: as zeros.
//
// What the caller sees to:
// `tag` is NULL or NUL-terminated; `options` is NULL or a sized struct; `out_mark` is writable.
sire_status sire_reclaimable_open(const char *tag,
                                  const struct sire_reclaimable_options *options,
                                  uint64_t *out_mark);

// The program has used what a mark is about `seconds_ago` (0: now) for the last time: what its kernels do with memory that is there already Sire does
// not see.
sire_status sire_reclaimable_used(uint64_t mark,
                                  double seconds_ago);

// Takes the consent back. What is away by it comes back now; if there is no room, later, at a safe point, and the status says why. `told` (NULL: nobody)
// hears in the calling thread of what was resumed. Of a mark that is closed already there is nothing to do.
//
// What the caller sees to:
// `told` is NULL or can be called with `told_context`.
sire_status sire_reclaimable_close(uint64_t mark,
                                   sire_told told,
                                   void *told_context);

// All marks of this process, as JSON (docs/preemption.md). A text output.
//
// What the caller sees to:
// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_reclaimable_json(char *buf, size_t cap, size_t *out_len);

// From now on this process uses the device in turns with others of its group, of whatever user; waits for the first turn. When a turn lasted its quantum, and
// somebody waits, everything that this process has in regions is paused at the next safe point (`sire_safe_point`), backed up whatever the
// regions' policies say, and threads wait there for the next turn. `SIRE_STATUS_BUSY` if the first was not to be had in time; `sire_cancel`
// ends the wait. One at a time in a process.
//
// What the caller sees to:
// `options` is a sized struct whose strings are NULL or NUL-terminated.
sire_status sire_time_slice_open(int32_t device,
                                 const struct sire_time_slice_options *options);

// This process takes turns no more, and leaves the device to others: what it still has there is in their way. In another's turn what is paused comes
// back if there is room, before threads at safe points go on; if not, it stays paused as if that was asked from outside (`sire resume`,
// `sire_control_give_up`), and the status says so. In a forked child it does nothing.
sire_status sire_time_slice_close(void);

// Where this process is in its turns, as in `time_slice` of `sire_stats_json`; `null` if it takes none. A text output.
//
// What the caller sees to:
// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_time_slice_json(char *buf, size_t cap, size_t *out_len);

// Opens the control socket of this process, unless it is open (docs/control.md): processes of the same user can list figures, and pause and resume at
// safe points. A text output: the socket's path.
//
// What the caller sees to:
// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_control_open(char *buf,
                              size_t cap,
                              size_t *out_len);

// Closes the control socket. What is paused from outside is resumed, because nobody could do that afterwards; if that fails it stays paused,
// and the status says why. `told` (NULL: nobody) hears in the calling thread of each tag that was resumed, before threads that wait for it go on.
//
// What the caller sees to:
// `told` is NULL or can be called with `told_context`.
sire_status sire_control_close(sire_told told,
                               void *told_context);

// Resumes what was paused from outside, without waiting for anybody: for a thread that cannot stay at its safe point any longer. `told` as for
// `sire_control_close`.
//
// What the caller sees to:
// `told` is NULL or can be called with `told_context`.
sire_status sire_control_give_up(sire_told told,
                                 void *told_context);

// The calling thread is at a safe point: until this returns it uses no memory of a region. If another process has asked for a pause
// or a resume, it happens now, in this thread, and a thread that was paused waits here for its resume. Once a thread has called this,
// pauses from outside wait for it, until it ends or calls `sire_safe_point_leave`. While neither the socket nor time slices were ever opened it does nothing.
//
// Returns when all is over, or after `slice_seconds`; `*out_held`: whether the program is still paused, so that the thread must call
// this again at once. `options` NULL: nobody is asked or told, and it returns when all is over.
//
// What the caller sees to:
// `options` is NULL or a sized struct; `out_held` is NULL or writable.
sire_status sire_safe_point(const struct sire_safe_point_options *options,
                            bool *out_held);

// Pauses from outside do not wait for the calling thread any more, until it passes a safe point again: it uses no memory of a region meanwhile.
sire_status sire_safe_point_leave(void);

// Waits until another process asks for figures that only the program knows, at most `timeout_seconds`; the answer is `sire_control_publish`. For
// a thread of the program's that does nothing else.
//
// What the caller sees to:
// `out_asked` is NULL or writable.
sire_status sire_control_wait(double timeout_seconds,
                              bool *out_asked);

// What the program says about itself, as JSON: shown under `program` to whoever asks.
//
// What the caller sees to:
// `json` is NULL or NUL-terminated.
sire_status sire_control_publish(const char *json);

// Gives `peer` access to present and future memory on `device`, whatever the program takes back by CUDA's own calls.
sire_status sire_allow_peer(int32_t device, int32_t peer);

// Bytes of device memory that allocations and resumes leave free.
sire_status sire_set_margin(size_t bytes);

// Where disk backups go from now on.
//
// What the caller sees to:
// `path` is NULL or NUL-terminated.
sire_status sire_set_disk_directory(const char *path);

// Gives back what is only cached. Outputs: bytes of device and of host memory. Refused during a capture.
//
// What the caller sees to:
// Both outputs are NULL or writable.
sire_status sire_trim(size_t *out_device_bytes, size_t *out_host_bytes);

// Whether a `cudaMalloc` of this process reaches this library (1) or not (0).
//
// What the caller sees to:
// `out_live` is NULL or writable.
sire_status sire_hook_probe(int32_t *out_live);

// Whether look-ups of the driver's functions in this process reach this library (1) or not (0): `libsire_driver.so` is preloaded.
//
// What the caller sees to:
// `out_live` is NULL or writable.
sire_status sire_driver_hook_probe(int32_t *out_live);

// Everything observable, as JSON (docs/abi.md shows it). A text output: call with `cap` 0 to measure.
//
// What the caller sees to:
// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
sire_status sire_stats_json(char *buf, size_t cap, size_t *out_len);

// A stream capture begins that no hook sees. Until `sire_capture_end` Sire never synchronises.
sire_status sire_capture_begin(void);

// The capture is over.
sire_status sire_capture_end(void);

// For the whole process: `change_current_allocator(CUDAPluggableAllocator(path, "sire_torch_malloc", "sire_torch_free"))`.
// Raises a C++ exception if memory is short. No bytes: NULL.
//
// What the caller sees to:
// The caller can take a C++ exception.
void *sire_torch_malloc(ptrdiff_t bytes,
                        int device,
                        void *stream);

// For a MemPool: NULL if memory is short, and on every other failure (see `sire_last_error`).
//
// What the caller sees to:
// None beyond being called from C.
void *sire_torch_pool_malloc(ptrdiff_t bytes, int device, void *stream);

// Frees what either of the two made. NULL is nothing to do.
//
// What the caller sees to:
// None beyond being called from C; a pointer that is not Sire's goes to the CUDA runtime.
void sire_torch_free(void *ptr, ptrdiff_t _bytes, int _device, void *_stream);

// `stream` uses the tensor at `ptr`, too: its memory is not used again before what the stream has been given until the free is done.
// For `set_record_stream_fn`, as the next ones are for the setters of their names; PyTorch gets all of them with the first allocation.
void sire_torch_record_stream(void *ptr,
                              void *stream);

// From now on, allocations on `device` on streams that `filter` (a `std::function<bool(cudaStream_t)>`, or NULL for all) takes belong to the
// private pool, and a capture is in progress.
//
// What the caller sees to:
// `filter` is NULL or such a function, and lives until this returns.
void sire_torch_begin_allocate_to_pool(int device,
                                       struct sire_torch_pool_id pool,
                                       const void *filter);

// Not any more.
void sire_torch_end_allocate_to_pool(int device, struct sire_torch_pool_id pool);

// Nobody needs the private pool any more: what is free in it can be given back.
void sire_torch_release_pool(int device, struct sire_torch_pool_id pool);

// Gives the driver what is cached (`torch.cuda.empty_cache`).
void sire_torch_reset(void);

// The most memory that may be cached and in use, as a part of what the device has.
void sire_torch_set_memory_fraction(double fraction, int device);

// The start of the allocation that holds `ptr`, and its bytes; `ptr` itself, and 0, if it is not Sire's.
//
// What the caller sees to:
// `out_bytes` is NULL or writable.
void *sire_torch_base_allocation(void *ptr, size_t *out_bytes);

// Whether this thread's allocations belong to a region from now on.
void tms_set_interesting_region(bool interesting_region);

// What was set, or `TMS_INIT_ENABLE`.
bool tms_get_interesting_region(void);

// The tag of this thread's allocations. A tag that cannot be (NULL, not UTF-8, too long) is refused: allocations then fail.
//
// What the caller sees to:
// `tag` is NULL or a NUL-terminated string.
void tms_set_current_tag(const char *tag);

// This thread's tag; "default" at first. The string is never freed.
const char *tms_get_current_tag(void);

// Whether this thread's allocations are backed up in host memory.
void tms_set_enable_cpu_backup(bool enable_cpu_backup);

// What was set, or `TMS_INIT_ENABLE_CPU_BACKUP`.
bool tms_get_enable_cpu_backup(void);

// "pinned" or "mmap": whether this thread's next allocations are backed up in memory that is registered with the driver (where that
// allows it), or in pageable memory.
//
// What the caller sees to:
// `backend` is NULL or a NUL-terminated string.
void tms_set_cpu_backup_backend(const char *backend);

// What was set, or `TMS_INIT_CPU_BACKUP_BACKEND`, or "pinned".
const char *tms_get_cpu_backup_backend(void);

// Whether this thread's allocations are backed up on disk.
void tms_set_enable_disk_backup(bool enable_disk_backup);

// What was set, or `TMS_INIT_ENABLE_DISK_BACKUP`.
bool tms_get_enable_disk_backup(void);

// Where disk backups go from now on.
//
// What the caller sees to:
// `dir` is NULL or a NUL-terminated string.
void tms_set_disk_backup_dir(const char *dir);

// Whether host backups keep their space after resume. For regions that are first used from now on.
void tms_set_retain_cpu_backup(bool retain_cpu_backup);

// What was set, or `TMS_RETAIN_CPU_BACKUP`.
bool tms_get_retain_cpu_backup(void);

// Device memory that allocations leave free.
void set_memory_margin_bytes(uint64_t value);

// Pauses the tag, or everything if it is NULL or empty. 0, or a `sire_status`. Pausing what is paused is 0.
//
// What the caller sees to:
// `tag` is NULL or a NUL-terminated string.
int tms_pause(const char *tag);

// Resumes the tag, or everything if it is NULL or empty. 0, or a `sire_status`. Resuming what is resident is 0.
//
// What the caller sees to:
// `tag` is NULL or a NUL-terminated string.
int tms_resume(const char *tag);

// No pause takes the allocation that holds `gpu_ptr` until it is freed. Its bytes; 0 if it is none of Sire's, or is paused.
uint64_t tms_keep_resident(const void *gpu_ptr);

// The host backup of `[gpu_ptr, gpu_ptr + size)`, valid until the next resume; NULL if there is none.
uint8_t *tms_get_cpu_backup_pointer(const uint8_t *gpu_ptr, uint64_t size);

// For a MemPool, as [`torch::sire_torch_pool_malloc`].
//
// What the caller sees to:
// As there.
void *tms_torch_malloc(ptrdiff_t bytes, int device, void *stream);

// Frees what [`tms_torch_malloc`] made.
//
// What the caller sees to:
// As [`torch::sire_torch_free`].
void tms_torch_free(void *ptr, ptrdiff_t _bytes, int _device, void *_stream);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* SIRE_H */
