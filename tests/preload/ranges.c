/* keep and discard override a region's policy for a range; a backup can be looked at while the region is paused. */
#include "support.h"

int main(void) {
    uint32_t thrown = region_of("thrown", 0), kept = region_of("kept", 1);
    unsigned char *a = allocate_in(thrown, 8 * MiB), *b = allocate_in(kept, 8 * MiB);
    fill(a, 8 * MiB, 1);
    fill(b, 8 * MiB, 2);
    OK(sire_keep(a + 2 * MiB, MiB));
    OK(sire_discard(b, 4 * MiB));
    sire_report report = {.struct_size = sizeof report};
    const void *data = (void *)1;
    void *token = NULL;
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_backup_get(b + 5 * MiB, 16, &data, &token));
    CHECK(data == (void *)1 && token == NULL);
    OK(sire_pause(NULL, NULL, &report));
    CHECK(report.bytes_copied >= 5 * MiB && report.bytes_copied < 16 * MiB && report.bytes_discarded > 0);
    OK(sire_backup_get(b + 5 * MiB, MiB, &data, &token));
    for (size_t i = 0; i < MiB; i++) CHECK(((const unsigned char *)data)[i] == byte_at(2, 5 * MiB + i));
    EXPECT(SIRE_STATUS_UNKNOWN_ADDRESS, sire_backup_get(a, 16, NULL, &token));
    OK(sire_resume(NULL, NULL, NULL));
    /* The token keeps the bytes readable whatever has happened since. */
    fill(b, 8 * MiB, 3);
    CHECK(((const unsigned char *)data)[7] == byte_at(2, 5 * MiB + 7));
    OK(sire_backup_put(token));
    unsigned char *host = malloc(MiB);
    CUDA(0, cudaMemcpy(host, a + 2 * MiB, MiB, TO_HOST));
    for (size_t i = 0; i < MiB; i++) CHECK(host[i] == byte_at(1, 2 * MiB + i));
    free(host);
    CUDA(0, cudaFree(a));
    CUDA(0, cudaFree(b));
    return 0;
}
