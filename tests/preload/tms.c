/* The C functions of torch_memory_saver, used as that package's Python uses them. argv: api | init | disk (the last two under
 * TMS_INIT_*). */
#include "support.h"
#include <pthread.h>

static void *another_thread(void *unused) {
    (void)unused;
    /* Settings are a thread's own. */
    CHECK(!tms_get_interesting_region() && !tms_get_enable_cpu_backup());
    CHECK(!strcmp(tms_get_current_tag(), "default"));
    return NULL;
}

/* What the arena's memory that is registered with the driver amounts to. */
static unsigned long long registered(void) {
    char json[8192];
    OK(sire_stats_json(json, sizeof json, NULL));
    const char *at = strstr(json, "\"registered_bytes\":"); /* the host tier is the first */
    unsigned long long bytes = 0;
    CHECK(at != NULL && sscanf(at, "\"registered_bytes\":%llu", &bytes) == 1);
    return bytes;
}

/* Of two allocations of a tag one stays on the device; "mmap" is memory that the driver does not know. */
static void residency(void) {
    void *stays = NULL, *goes = NULL, *pinned = NULL;
    tms_set_interesting_region(true);
    tms_set_current_tag("mixed");
    tms_set_enable_cpu_backup(true);
    tms_set_cpu_backup_backend("mmap");
    CUDA(0, cudaMalloc(&stays, 4 * MiB));
    CUDA(0, cudaMalloc(&goes, 6 * MiB));
    tms_set_cpu_backup_backend("pinned");
    CUDA(0, cudaMalloc(&pinned, 2 * MiB));
    tms_set_enable_cpu_backup(false);
    tms_set_interesting_region(false);
    fill(goes, 6 * MiB, 5);
    CHECK(tms_keep_resident((char *)stays + 100) == 4 * MiB && tms_keep_resident(stays) == 4 * MiB);
    CHECK(tms_keep_resident(&stays) == 0 && tms_keep_resident(NULL) == 0);
    unsigned long long known = registered();
    uint64_t used = device_used(0);
    CHECK(tms_pause("mixed") == 0 && used - device_used(0) == 8 * MiB);
    fill(stays, 4 * MiB, 6);
    unsigned long long now = registered();
    CHECK(now - known >= 2 * MiB && now - known < 8 * MiB);
    CHECK(tms_keep_resident(stays) == 4 * MiB);
    CHECK(tms_keep_resident(goes) == 0);
    SAYS("it is paused");
    EXPECT(SIRE_STATUS_PAUSED, sire_keep_resident(goes, NULL));
    EXPECT(SIRE_STATUS_PAUSED, sire_require_usable(goes));
    CHECK(tms_resume("mixed") == 0 && device_used(0) == used);
    CHECK(holds(stays, 4 * MiB, 6) && holds(goes, 6 * MiB, 5));
    CUDA(0, cudaFree(stays));
    CHECK(tms_keep_resident(stays) == 0);
    CUDA(0, cudaFree(goes));
    CUDA(0, cudaFree(pinned));
}

static void api(void) {
    residency();
    tms_set_current_tag("default");

    CHECK(!tms_get_interesting_region() && !tms_get_enable_cpu_backup() && !tms_get_enable_disk_backup());
    CHECK(!strcmp(tms_get_current_tag(), "default") && !strcmp(tms_get_cpu_backup_backend(), "pinned"));
    CHECK(!tms_get_retain_cpu_backup());
    void *plain = NULL, *kv = NULL, *weights = NULL, *file = NULL;
    CUDA(0, cudaMalloc(&plain, MiB));
    CHECK(!sire_owns(plain));

    tms_set_current_tag("kv_cache");
    tms_set_interesting_region(true);
    CUDA(0, cudaMalloc(&kv, 4 * MiB));
    tms_set_current_tag("weights");
    tms_set_enable_cpu_backup(true);
    tms_set_cpu_backup_backend("mmap");
    CHECK(!strcmp(tms_get_cpu_backup_backend(), "mmap"));
    tms_set_cpu_backup_backend("paper");
    SAYS("paper");
    CHECK(!strcmp(tms_get_cpu_backup_backend(), "mmap"));
    weights = tms_torch_malloc(3 * MiB, 0, NULL);
    CHECK(weights != NULL && !strcmp(tms_get_current_tag(), "weights"));
    tms_set_enable_disk_backup(true);
    CHECK(cudaMalloc(&file, MiB) == 1);
    SAYS("both on");
    tms_set_enable_cpu_backup(false);
    tms_set_current_tag("file");
    CUDA(0, cudaMalloc(&file, 2 * MiB));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, another_thread, NULL) == 0 && pthread_join(thread, NULL) == 0);
    tms_set_interesting_region(false);
    tms_set_enable_disk_backup(false);

    fill(weights, 3 * MiB, 1);
    fill(file, 2 * MiB, 2);
    CHECK(tms_get_cpu_backup_pointer(weights, 3 * MiB) == NULL);
    uint64_t used = device_used(0);
    CHECK(tms_pause("weights") == 0);
    CHECK(tms_pause("weights") == 0);
    CHECK(tms_pause("nobody") == 0);
    CHECK(used - device_used(0) >= 3 * MiB);
    unsigned char *backup = tms_get_cpu_backup_pointer(weights, 3 * MiB);
    CHECK(backup != NULL);
    for (size_t i = 0; i < 3 * MiB; i++) CHECK(backup[i] == byte_at(1, i));
    CHECK(tms_get_cpu_backup_pointer((unsigned char *)weights + 100, 50)[49] == byte_at(1, 149));
    CHECK(tms_get_cpu_backup_pointer(plain, 16) == NULL);
    CHECK(tms_pause(NULL) == 0);
    CHECK(tms_resume("file") == 0 && holds(file, 2 * MiB, 2));
    CHECK(tms_resume("") == 0 && holds(weights, 3 * MiB, 1));
    CHECK(device_used(0) == used);

    tms_set_retain_cpu_backup(true);
    CHECK(tms_get_retain_cpu_backup());
    set_memory_margin_bytes(0);

    /* A refused tag stops allocations instead of putting them under the one before. */
    static char long_tag[300];
    memset(long_tag, 'x', sizeof long_tag - 1);
    tms_set_interesting_region(true);
    tms_set_current_tag(long_tag);
    void *none = NULL;
    CHECK(cudaMalloc(&none, MiB) == 1 && none == NULL);
    tms_set_current_tag("weights");
    CUDA(0, cudaMalloc(&none, MiB));
    CHECK(sire_owns(none));
    tms_torch_free(none, MiB, 0, NULL);
    tms_torch_free(weights, 3 * MiB, 0, NULL);
    CUDA(0, cudaFree(kv));
    CUDA(0, cudaFree(file));
    CUDA(0, cudaFree(plain));
}

static void init(void) {
    CHECK(tms_get_interesting_region() && tms_get_enable_cpu_backup() && tms_get_retain_cpu_backup());
    CHECK(!strcmp(tms_get_cpu_backup_backend(), "mmap"));
    void *ours = NULL;
    CUDA(0, cudaMalloc(&ours, 2 * MiB));
    CHECK(sire_owns(ours));
    fill(ours, 2 * MiB, 4);
    CHECK(tms_pause("default") == 0);
    CHECK(tms_resume("default") == 0 && holds(ours, 2 * MiB, 4));
    tms_set_interesting_region(false);
    void *plain = NULL;
    CUDA(0, cudaMalloc(&plain, MiB));
    CHECK(!sire_owns(plain));
    CUDA(0, cudaFree(plain));
    CUDA(0, cudaFree(ours));
}

static void disk(void) {
    CHECK(tms_get_interesting_region() && tms_get_enable_disk_backup() && !tms_get_enable_cpu_backup());
    void *ours = NULL;
    CUDA(0, cudaMalloc(&ours, 3 * MiB));
    fill(ours, 3 * MiB, 8);
    uint64_t used = device_used(0);
    CHECK(tms_pause(NULL) == 0);
    CHECK(device_used(0) < used);
    char json[8192];
    OK(sire_stats_json(json, sizeof json, NULL));
    CHECK(strstr(json, "\"backup\":\"disk\""));
    CHECK(tms_resume(NULL) == 0 && holds(ours, 3 * MiB, 8));
    CUDA(0, cudaFree(ours));
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    !strcmp(argv[1], "disk") ? disk() : !strcmp(argv[1], "init") ? init() : api();
    return 0;
}
