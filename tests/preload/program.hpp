// What the C++ programs share: CUDA's runtime as they call it, memory that a destructor frees, and Sire's functions where Sire is there. They link CUDA
// alone, as programs do that have never heard of Sire.
#pragma once

#include "sire.h"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <new>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

extern "C" {
int cudaMalloc(void **out, size_t bytes), cudaFree(void *ptr), cudaGetLastError(void), cudaSetDevice(int device);
int cudaMallocHost(void **out, size_t bytes), cudaFreeHost(void *ptr);
int cudaMallocAsync(void **out, size_t bytes, void *stream), cudaFreeAsync(void *ptr, void *stream);
int cudaMemGetInfo(size_t *free_bytes, size_t *total), cudaDeviceSynchronize(void);
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind), cudaMemset(void *to, int value, size_t bytes);
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream);
int cudaStreamCreateWithFlags(void **stream, unsigned flags), cudaStreamSynchronize(void *stream), cudaStreamDestroy(void *stream);
}

constexpr size_t KiB = 1 << 10, MiB = 1 << 20;
enum { TO_DEVICE = 1, TO_HOST = 2, ON_DEVICE = 3 };

#define CHECK(condition)                                                                                                          \
    do {                                                                                                                          \
        if (!(condition)) {                                                                                                       \
            std::fprintf(stderr, "%s:%d: %s does not hold (%s)\n", __FILE__, __LINE__, #condition, last_message().c_str());        \
            _exit(1);                                                                                                             \
        }                                                                                                                         \
    } while (0)

// A function of Sire's; nullptr where the program runs without it.
#define OF_SIRE(name) reinterpret_cast<decltype(&name)>(dlsym(RTLD_DEFAULT, #name))

inline std::string last_message() {
    char message[1024] = "";
    if (auto last_error = OF_SIRE(sire_last_error)) last_error(message, sizeof message);
    return message;
}

struct OutOfMemory : std::bad_alloc {
    const char *what() const noexcept override { return "the device is full"; }
};

inline void cuda(int code) {
    if (code == 2) {
        cudaGetLastError();
        throw OutOfMemory();
    }
    if (code != 0) throw std::runtime_error("CUDA answered " + std::to_string(code) + ": " + last_message());
}

// Device memory that goes with its owner.
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(size_t bytes) : bytes_(bytes) { cuda(cudaMalloc(&address_, bytes)); }
    Buffer(Buffer &&other) noexcept { swap(other); }
    Buffer &operator=(Buffer &&other) noexcept {
        Buffer(std::move(other)).swap(*this);
        return *this;
    }
    ~Buffer() {
        // 4: at the process's end the driver may have gone already.
        int code = cudaFree(address_);
        CHECK(code == 0 || code == 4);
    }

    void write(unsigned seed) {
        std::vector<unsigned char> host(bytes_);
        for (size_t i = 0; i < bytes_; i++) host[i] = static_cast<unsigned char>(seed * 131 + i * 7 + (i >> 12) * 13);
        cuda(cudaMemcpy(address_, host.data(), bytes_, TO_DEVICE));
    }
    // FNV-1a of its bytes.
    uint64_t digest() const {
        std::vector<unsigned char> host(bytes_);
        cuda(cudaMemcpy(host.data(), address_, bytes_, TO_HOST));
        uint64_t hash = 14695981039346656037ull;
        for (unsigned char byte : host) hash = (hash ^ byte) * 1099511628211ull;
        return hash;
    }
    unsigned char *at(size_t offset = 0) const { return static_cast<unsigned char *>(address_) + offset; }
    size_t bytes() const { return bytes_; }

private:
    void swap(Buffer &other) noexcept {
        std::swap(address_, other.address_);
        std::swap(bytes_, other.bytes_);
    }
    void *address_ = nullptr;
    size_t bytes_ = 0;
};

// Physical bytes in use on device 0: the software device's own count.
inline uint64_t device_used() {
    auto used = reinterpret_cast<uint64_t (*)(int)>(dlsym(RTLD_DEFAULT, "sire_sim_used"));
    CHECK(used != nullptr);
    return used(0);
}
