/* A driver that lies, so that the demo can show that it would notice.
 *
 * Built as a shared library that NEEDs the real libcuda.so.1 and overrides one function; given to Sire as SIRE_LIBCUDA.
 * Everything that is not overridden is found in libcuda.so.1 through the dependency.
 *   -DUNMAP_ONLY  physical memory is never given back: cuMemRelease succeeds without doing it
 *   -DSKIP_COPY   backups stay empty: copies from the device succeed without copying */
#include <stddef.h>

#ifdef UNMAP_ONLY
int cuMemRelease(unsigned long long handle) {
    (void)handle;
    return 0;
}
#endif

#ifdef SKIP_COPY
int cuMemcpyDtoHAsync_v2(void *host, unsigned long long device, size_t bytes, void *stream) {
    (void)host, (void)device, (void)bytes, (void)stream;
    return 0;
}
#endif
