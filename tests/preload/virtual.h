/* The driver's structs of virtual memory, as a program without NVIDIA's headers writes them: CUmemLocation, CUmemAllocationProp, CUmemAccessDesc, CUmemPoolProps. */
#pragma once

typedef struct { int kind, id; } location;
typedef struct {
    int kind, handle_types;
    location where;
    void *win32;
    struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} properties;
typedef struct { location where; int flags; } permission;
typedef struct { int kind, handle_types; location where; unsigned long long rest[9]; } pool_properties;
