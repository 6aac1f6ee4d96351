/* Pauses and resumes a tag on command, and measures the machine's own ceiling beside it.
 *
 *     cycle BYTES PIECES host|disk retain|drop [DISK-DIRECTORY]
 *
 * Each line on standard input, a number N, is one cycle, answered by one line of JSON. A cycle writes bytes that were never there before,
 * pauses, takes all of the device's free memory and overwrites it (so that old bytes cannot come back by accident, and memory that was
 * not released is missed), resumes, and compares every byte. The ceiling is a plain copy of as many bytes on one stream, between a resident
 * buffer of the device and a prefaulted host buffer, in pieces of whichever size is fastest here. N even: the copy out is timed before the pause and the copy
 * in after the resume; N odd: the other way round. `fault N`: also times bringing in that much fresh host memory by one thread.
 *
 * On a software device that keeps virtual time (SIRE_SIM_PROFILE) pauses, resumes and plain copies are timed by that.
 *
 * With `disk`, the file's pages are forced to the disk and dropped from the page cache between pause and resume; the time of that
 * belongs to the pause (`flush`). With `drop`, backups are made anew in each cycle; free memory is then touched before the pause. */
#include "peer.h"
#include <dirent.h>

enum { COPY = 64 << 20 };

struct bench {
    size_t bytes, pieces, piece, window;
    void **at;
    void *reference;
    char *host;
    uint64_t generation;
    size_t step[3];
    int on_disk, fresh;
    char directory[4096];
};

static sire_status (*pause_tag)(const char *, const sire_pause_options *, sire_report *);
static sire_status (*resume_tag)(const char *, const sire_resume_options *, sire_report *);
/* Of type void in torch_memory_saver, so the result is read only where Sire is known to be loaded. */
static int (*tms_pause_tag)(const char *), (*tms_resume_tag)(const char *);

static cudaError (*copy_queued)(void *, const void *, size_t, int, void *);
static cudaError (*synchronize)(void *);

/* The software device's virtual time, where it keeps one. */
static double (*virtual_now)(void);

/* By what pauses, resumes and the copies beside them are timed. */
static double tick(void) { return virtual_now ? virtual_now() : now(); }

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* Writes (or compares) every byte of the tag through the host window. */
static void each_byte(struct bench *bench, int compare) {
    size_t step = smaller(bench->window, COPY);
    for (size_t index = 0; index < bench->pieces; index++) {
        for (size_t from = 0; from < bench->piece; from += step) {
            size_t bytes = smaller(step, bench->piece - from);
            uint64_t *words = (uint64_t *)bench->host;
            char *device = (char *)bench->at[index] + from;
            if (compare) {
                MUST(cudaMemcpy(words, device, bytes, TO_HOST) == 0);
                if (!pattern_holds(words, bytes / 8, from / 8, index, bench->generation)) wrong_bytes("after the resume", index);
            } else {
                pattern_write(words, bytes / 8, from / 8, index, bench->generation);
                MUST(cudaMemcpy(device, words, bytes, TO_DEVICE) == 0);
            }
        }
    }
}

/* Seconds for a plain copy of `amount` bytes, everything queued at once. */
static double copy_amount(struct bench *bench, int direction, size_t amount, size_t step) {
    size_t place = 0;
    double start = tick();
    for (size_t done = 0; done < amount;) {
        if (place == bench->window) place = 0;
        size_t bytes = smaller(smaller(step, bench->window - place), amount - done);
        char *device = (char *)bench->reference + place, *host = bench->host + place;
        char *to = direction == TO_HOST ? host : device, *from = direction == TO_HOST ? device : host;
        MUST(copy_queued(to, from, bytes, direction, NULL) == 0);
        place += bytes, done += bytes;
    }
    MUST(synchronize(NULL) == 0);
    return tick() - start;
}

static double plain_copy(struct bench *bench, int direction) {
    return copy_amount(bench, direction, bench->bytes, bench->step[direction]);
}

/* A copy in small pieces may beat one in large pieces, or the other way round: the faster one is the ceiling. */
static void calibrate(struct bench *bench, int direction) {
    double best = 1e9;
    copy_amount(bench, direction, bench->window, COPY);
    for (int round = 0; round < 3; round++) {
        for (size_t step = 4 << 20; step <= COPY; step *= 4) {
            double seconds = copy_amount(bench, direction, bench->window, step);
            if (seconds < best) best = seconds, bench->step[direction] = step;
        }
    }
}

/* Takes what the pause gave back and leaves other bytes in it. Without this, memory that never went away would pass. */
static void overwrite_free_memory(struct bench *bench) {
    void **taken = malloc(sizeof *taken * bench->pieces);
    for (size_t i = 0; i < bench->pieces; i++) {
        MUST(cudaMalloc(&taken[i], bench->piece) == 0);
        MUST(cudaMemset(taken[i], 0xEE, bench->piece) == 0);
    }
    /* A plain copy waits for the fills. */
    MUST(cudaMemcpy(bench->host, taken[bench->pieces - 1], 8, TO_HOST) == 0);
    for (size_t i = 0; i < bench->pieces; i++) MUST(cudaFree(taken[i]) == 0);
    free(taken);
}

static double huge_bytes(void) { return proc_bytes("/proc/self/smaps_rollup", "AnonHugePages:"); }

static double fault_in(size_t bytes) {
    char *fresh = host_map(bytes);
    double start = now();
    for (size_t at = 0; at < bytes; at += 4096) ((volatile char *)fresh)[at] = 0;
    double seconds = now() - start;
    munmap(fresh, bytes);
    return seconds;
}

/* Share of the file's pages that are in the page cache. */
static double cached_share(int file, size_t bytes) {
    void *map = mmap(NULL, bytes, PROT_READ, MAP_SHARED, file, 0);
    if (map == MAP_FAILED) return 1;
    size_t pages = (bytes + 4095) / 4096, found = 0;
    unsigned char *present = calloc(pages, 1);
    if (mincore(map, bytes, present) == 0) {
        for (size_t i = 0; i < pages; i++) found += present[i] & 1;
    }
    free(present);
    munmap(map, bytes);
    return (double)found / (double)pages;
}

/* Each file of this process in the backup directory once, however often it is open. */
static int backups(struct bench *bench, int files[], int most) {
    DIR *open_files = opendir("/proc/self/fd");
    MUST(open_files);
    ino_t seen[64];
    int count = 0;
    for (struct dirent *entry; (entry = readdir(open_files));) {
        char link[300], target[4200];
        snprintf(link, sizeof link, "/proc/self/fd/%s", entry->d_name);
        ssize_t length = readlink(link, target, sizeof target - 1);
        if (length < 0) continue;
        target[length] = 0;
        if (strncmp(target, bench->directory, strlen(bench->directory))) continue;
        int file = atoi(entry->d_name), known = 0;
        struct stat found;
        if (fstat(file, &found) || !S_ISREG(found.st_mode) || found.st_size == 0) continue;
        for (int i = 0; i < count; i++) known |= seen[i] == found.st_ino;
        if (known) continue;
        MUST(count < most && count < 64);
        seen[count] = found.st_ino, files[count++] = file;
    }
    closedir(open_files);
    MUST(count > 0);
    return count;
}

/* Seconds until all backups are on the disk. Then what of them is in the page cache is dropped; `cached` is the share that stays. */
static double flush_backups(struct bench *bench, double *cached) {
    int files[64], count = backups(bench, files, 64);
    double start = now();
    for (int i = 0; i < count; i++) MUST(fdatasync(files[i]) == 0);
    double seconds = now() - start;
    for (int i = 0; i < count; i++) {
        struct stat found;
        MUST(fstat(files[i], &found) == 0 && posix_fadvise(files[i], 0, 0, POSIX_FADV_DONTNEED) == 0);
        double share = cached_share(files[i], (size_t)found.st_size);
        *cached = share > *cached ? share : *cached;
    }
    return seconds;
}

static void cycle(struct bench *bench, int number, int with_fault) {
    double out = 0, in = 0, fault = 0, flush = 0, cached = 0;
    sire_report paused = {.struct_size = sizeof paused}, resumed = {.struct_size = sizeof resumed};
    bench->generation++;
    each_byte(bench, 0);
    if (with_fault && number % 2 == 0) fault_in(bench->bytes), fault = fault_in(bench->bytes);
    if (number % 2 == 0) out = plain_copy(bench, TO_HOST);
    else in = plain_copy(bench, TO_DEVICE);

    /* Where free memory goes back to a hypervisor within seconds, bringing memory in would measure the hypervisor. */
    if (bench->fresh || with_fault) fault_in(bench->bytes);
    /* To ask the kernel is to walk through every page, which leaves the caches cold for what is timed next: only where the answer is wanted. */
    double huge = with_fault ? huge_bytes() : 0;
    double start = tick();
    if (pause_tag) MUST(pause_tag("bench", NULL, &paused) == SIRE_STATUS_OK);
    else tms_pause_tag("bench");
    double pause = tick() - start;
    huge = with_fault ? huge_bytes() - huge : 0;

    if (bench->on_disk) flush = flush_backups(bench, &cached);
    overwrite_free_memory(bench);

    start = tick();
    if (resume_tag) MUST(resume_tag("bench", NULL, &resumed) == SIRE_STATUS_OK);
    else tms_resume_tag("bench");
    double resume = tick() - start;

    if (number % 2 == 0) in = plain_copy(bench, TO_DEVICE);
    else out = plain_copy(bench, TO_HOST);
    if (with_fault && number % 2) fault_in(bench->bytes), fault = fault_in(bench->bytes);
    each_byte(bench, 1);
    printf("{\"pause\": %.9f, \"resume\": %.9f, \"out\": %.9f, \"in\": %.9f, \"fault\": %.9f, \"flush\": %.9f, \"cached\": %.4f, "
           "\"huge\": %.4f, \"pause_prepare\": %.9f, \"pause_transfer\": %.9f, \"resume_prepare\": %.9f, \"resume_transfer\": %.9f, "
           "\"out_step\": %zu, \"in_step\": %zu}\n",
           pause, resume, out, in, fault, flush, cached, huge / (double)bench->bytes, paused.seconds_prepare, paused.seconds_transfer,
           resumed.seconds_prepare, resumed.seconds_transfer, bench->step[TO_HOST], bench->step[TO_DEVICE]);
    fflush(stdout);
}

static void set_up(struct bench *bench, const char *retain) {
    void (*set_tag)(const char *) = (void (*)(const char *))sire("tms_set_current_tag");
    void (*set_region)(bool) = (void (*)(bool))sire("tms_set_interesting_region");
    void (*set_host)(bool) = (void (*)(bool))sire("tms_set_enable_cpu_backup");
    void (*set_disk)(bool) = (void (*)(bool))sire("tms_set_enable_disk_backup");
    void (*set_directory)(const char *) = (void (*)(const char *))sire("tms_set_disk_backup_dir");
    void (*set_retain)(bool) = (void (*)(bool))sire("tms_set_retain_cpu_backup");
    tms_pause_tag = (int (*)(const char *))sire("tms_pause");
    tms_resume_tag = (int (*)(const char *))sire("tms_resume");
    MUST(set_tag && set_region && set_host && set_disk && set_directory && set_retain && tms_pause_tag && tms_resume_tag);
    /* Sire's own names say how long the parts took; they do the same as the others. */
    pause_tag = (sire_status(*)(const char *, const sire_pause_options *, sire_report *))sire("sire_pause");
    resume_tag = (sire_status(*)(const char *, const sire_resume_options *, sire_report *))sire("sire_resume");

    virtual_now = (double (*)(void))sire("sire_sim_now");
    if (virtual_now && virtual_now() < 0) virtual_now = NULL;
    copy_queued = (cudaError(*)(void *, const void *, size_t, int, void *))sire("cudaMemcpyAsync");
    synchronize = (cudaError(*)(void *))sire("cudaStreamSynchronize");
    MUST(copy_queued && synchronize);

    set_retain(!strcmp(retain, "retain"));
    if (bench->on_disk) set_directory(bench->directory), set_disk(true);
    else set_host(true);
    set_tag("bench");
    set_region(true);
    for (size_t i = 0; i < bench->pieces; i++) MUST(cudaMalloc(&bench->at[i], bench->piece) == 0);
    set_region(false);
    MUST(cudaMalloc(&bench->reference, bench->window) == 0);
    MUST(cudaMemset(bench->reference, 5, bench->window) == 0);
}

int main(int argc, char **argv) {
    MUST(argc == 5 || argc == 6);
    struct bench bench = {.bytes = (size_t)atoll(argv[1]), .pieces = (size_t)atoll(argv[2]), .on_disk = !strcmp(argv[3], "disk"),
                          .fresh = strcmp(argv[4], "retain")};
    MUST(bench.pieces > 0 && bench.bytes % bench.pieces == 0 && (bench.piece = bench.bytes / bench.pieces) % 4096 == 0);
    MUST(!bench.on_disk || (argc == 6 && realpath(argv[5], bench.directory)));
    bench.window = smaller(bench.bytes, (size_t)512 << 20);
    bench.at = calloc(bench.pieces, sizeof *bench.at);
    bench.host = host_buffer(bench.window);
    set_up(&bench, argv[4]);
    calibrate(&bench, TO_DEVICE), calibrate(&bench, TO_HOST);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        int with_fault = !strncmp(line, "fault ", 6);
        cycle(&bench, atoi(line + (with_fault ? 6 : 0)), with_fault);
    }
    return 0;
}
