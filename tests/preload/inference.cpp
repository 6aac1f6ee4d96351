// Text generation as servers in C++ do it: weights in a few large buffers, as many layers on the device as its free memory holds and the others on the
// host, a cache of keys and values, a thread with a stream of its own per conversation, scratch memory from a pool. Each token depends on every byte that
// the earlier ones have touched; what comes out is printed. It has never heard of Sire, but for the one line at which a server may be paused.
// argv: POOL (kept: cudaMalloc, kept for later; ordered: cudaMallocAsync; mapped: the driver's virtual memory), HOW (never | own: it pauses itself in the
// middle | asked: it waits in the middle until another process has paused and resumed it), HEARD (0: what the pool maps itself stays on the device).
#include "program.hpp"
#include "virtual.h"
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

extern "C" {
int cuMemAddressReserve(unsigned long long *out, size_t bytes, size_t alignment, unsigned long long at, unsigned long long flags);
int cuMemAddressFree(unsigned long long addr, size_t bytes);
int cuMemGetAllocationGranularity(size_t *out, const properties *asked, int option);
int cuMemCreate(unsigned long long *out, size_t bytes, const properties *asked, unsigned long long flags), cuMemRelease(unsigned long long handle);
int cuMemMap(unsigned long long addr, size_t bytes, size_t offset, unsigned long long handle, unsigned long long flags);
int cuMemUnmap(unsigned long long addr, size_t bytes), cuMemSetAccess(unsigned long long addr, size_t bytes, const permission *granted, size_t count);
}

constexpr unsigned LAYERS = 12, THREADS = 3, TOKENS = 24;
constexpr size_t LAYER = 4 * MiB, ROW = 16 * KiB, KEPT_FREE = 88 * MiB;

static std::atomic<size_t> mapped_bytes;

// Scratch memory of one thread: what was taken last goes first.
struct Pool {
    virtual ~Pool() = default;
    virtual unsigned char *take(size_t bytes) = 0;
    virtual void give(unsigned char *memory, size_t bytes) = 0;
};

struct Kept : Pool {
    std::vector<Buffer> free, taken;
    unsigned char *take(size_t bytes) override {
        auto fits = std::find_if(free.begin(), free.end(), [&](const Buffer &buffer) { return buffer.bytes() >= bytes; });
        taken.push_back(fits == free.end() ? Buffer(bytes) : std::move(*fits));
        if (fits != free.end()) free.erase(fits);
        return taken.back().at();
    }
    void give(unsigned char *, size_t) override {
        free.push_back(std::move(taken.back()));
        taken.pop_back();
    }
};

struct Ordered : Pool {
    void *stream;
    explicit Ordered(void *stream) : stream(stream) {}
    unsigned char *take(size_t bytes) override {
        void *memory = nullptr;
        cuda(cudaMallocAsync(&memory, bytes, stream));
        return static_cast<unsigned char *>(memory);
    }
    void give(unsigned char *memory, size_t) override { cuda(cudaFreeAsync(memory, stream)); }
};

// One range of addresses that grows at its end. Handles are released at once: the mapping keeps the memory.
struct Mapped : Pool {
    static constexpr size_t RANGE = 256 * MiB;
    unsigned long long base = 0;
    size_t size = 0, used = 0, granularity = 0;
    properties asked = {1, 0, {1, 0}, nullptr, {}};
    Mapped() {
        cuda(cuMemGetAllocationGranularity(&granularity, &asked, 0));
        cuda(cuMemAddressReserve(&base, RANGE, 0, 0, 0));
    }
    ~Mapped() override {
        CHECK(used == 0);
        CHECK(cuMemUnmap(base, size) == 0 && cuMemAddressFree(base, RANGE) == 0);
        mapped_bytes -= size;
    }
    void grow(size_t bytes) {
        bytes = (bytes + granularity - 1) / granularity * granularity;
        unsigned long long handle = 0;
        cuda(cuMemCreate(&handle, bytes, &asked, 0));
        cuda(cuMemMap(base + size, bytes, 0, handle, 0));
        cuda(cuMemRelease(handle));
        permission granted = {{1, 0}, 3};
        cuda(cuMemSetAccess(base + size, bytes, &granted, 1));
        size += bytes;
        mapped_bytes += bytes;
    }
    unsigned char *take(size_t bytes) override {
        if (used + bytes > size) grow(used + bytes - size);
        used += bytes;
        return reinterpret_cast<unsigned char *>(base + used - bytes);
    }
    void give(unsigned char *memory, size_t bytes) override {
        used -= bytes;
        CHECK(reinterpret_cast<unsigned char *>(base + used) == memory);
    }
};

static std::unique_ptr<Pool> pool_of(const std::string &kind, void *stream) {
    if (kind == "kept") return std::make_unique<Kept>();
    if (kind == "ordered") return std::make_unique<Ordered>(stream);
    return std::make_unique<Mapped>();
}

class Weights {
public:
    Weights() {
        size_t free = 0, total = 0;
        cuda(cudaMemGetInfo(&free, &total));
        on_device = std::min<size_t>(LAYERS, (free - KEPT_FREE) / LAYER);
        for (size_t first = 0; first < on_device; first += 4) buffers.emplace_back(std::min<size_t>(4, on_device - first) * LAYER);
        cuda(cudaMallocHost(&on_host, LAYERS * LAYER));
        for (size_t i = 0; i < LAYERS * LAYER; i++) host(0)[i] = static_cast<unsigned char>((i * 2654435761u) >> 13 ^ i >> 12);
        for (size_t layer = 0; layer < on_device; layer++) cuda(cudaMemcpy(device(layer), host(layer), LAYER, TO_DEVICE));
        // What is on the device is nowhere else.
        std::memset(on_host, 0, on_device * LAYER);
    }
    ~Weights() { CHECK(cudaFreeHost(on_host) == 0); }
    // A row of a layer, brought to scratch memory.
    void bring(unsigned char *to, size_t layer, size_t row, void *stream) const {
        bool here = layer < on_device;
        cuda(cudaMemcpyAsync(to, (here ? device(layer) : host(layer)) + row * ROW, ROW, here ? ON_DEVICE : TO_DEVICE, stream));
    }
    size_t on_device = 0;

private:
    unsigned char *device(size_t layer) const { return buffers[layer / 4].at(layer % 4 * LAYER); }
    unsigned char *host(size_t layer) const { return static_cast<unsigned char *>(on_host) + layer * LAYER; }
    std::vector<Buffer> buffers;
    void *on_host = nullptr;
};

// In the middle all wait until this has been done once.
class Middle {
public:
    template <class Work> void reach(Work work) {
        std::unique_lock<std::mutex> lock(mutex);
        if (++arrived == THREADS) {
            work();
            done = true;
            changed.notify_all();
        }
        changed.wait(lock, [this] { return done; });
    }

private:
    std::mutex mutex;
    std::condition_variable changed;
    unsigned arrived = 0;
    bool done = false;
};

static std::string how, pool_kind;
static bool heard;
static Middle middle;
static std::atomic<bool> was_away;

static void pause_and_resume() {
    uint64_t before = device_used();
    CHECK(OF_SIRE(sire_pause)(nullptr, nullptr, nullptr) == SIRE_STATUS_OK);
    CHECK(before > 40 * MiB && device_used() == (heard ? 0 : mapped_bytes.load()));
    CHECK(OF_SIRE(sire_resume)(nullptr, nullptr, nullptr) == SIRE_STATUS_OK);
    was_away = true;
}

static int32_t told(void *, int32_t what, const char *) {
    if (what == 1) was_away = true;
    return SIRE_STATUS_OK;
}

static void all_are_there() {
    std::puts("in the middle");
    std::fflush(stdout);
    if (how == "own") pause_and_resume();
}

// The one line: nothing of this thread's is under way.
static void between_two_tokens(unsigned token) {
    if (token == TOKENS / 2) middle.reach(all_are_there);
    if (how != "asked") return;
    sire_safe_point_options options = {};
    options.struct_size = sizeof options;
    options.told = told;
    auto safe_point = OF_SIRE(sire_safe_point);
    do {
        CHECK(safe_point(&options, nullptr) == SIRE_STATUS_OK);
        if (token == TOKENS / 2 && !was_away) usleep(1000);
    } while (token == TOKENS / 2 && !was_away);
}

static uint64_t mixed(uint64_t state, const unsigned char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) state = (state ^ bytes[i]) * 1099511628211ull;
    return state;
}

class Conversation {
public:
    Conversation(const Weights &weights, unsigned char *cache, unsigned number) : weights(weights), cache(cache), state(number + 1) {
        cuda(cudaSetDevice(0));
        cuda(cudaStreamCreateWithFlags(&stream, 1));
        cuda(cudaMallocHost(&answer, 2 * ROW));
        pool = pool_of(pool_kind, stream);
    }
    ~Conversation() {
        pool.reset();
        CHECK(cudaFreeHost(answer) == 0 && cudaStreamDestroy(stream) == 0);
    }
    uint64_t talk() {
        for (unsigned token = 0; token < TOKENS; token++) {
            between_two_tokens(token);
            say(token);
        }
        return state;
    }

private:
    // More and more memory, as a context grows.
    void say(unsigned token) {
        size_t bytes = (token / 8 + 1) * MiB;
        unsigned char *outer = pool->take(bytes), *scratch = pool->take(2 * ROW);
        for (size_t layer = 0; layer < LAYERS; layer++) through(layer, token, scratch, outer + bytes - ROW);
        pool->give(scratch, 2 * ROW);
        pool->give(outer, bytes);
    }
    void through(size_t layer, unsigned token, unsigned char *scratch, unsigned char *far) {
        weights.bring(far, layer, state % (LAYER / ROW), stream);
        cuda(cudaMemcpyAsync(scratch, far, ROW, ON_DEVICE, stream));
        cuda(cudaMemcpyAsync(cache + (token % 8) * ROW, far, ROW, ON_DEVICE, stream));
        cuda(cudaMemcpyAsync(scratch + ROW, cache + (state >> 20) % 8 * ROW, ROW, ON_DEVICE, stream));
        cuda(cudaMemcpyAsync(answer, scratch, 2 * ROW, TO_HOST, stream));
        cuda(cudaStreamSynchronize(stream));
        state = mixed(state, static_cast<unsigned char *>(answer), 2 * ROW);
    }
    const Weights &weights;
    unsigned char *cache;
    uint64_t state;
    void *stream = nullptr, *answer = nullptr;
    std::unique_ptr<Pool> pool;
};

int main(int, char **argv) {
    alarm(100);
    pool_kind = argv[1], how = argv[2], heard = argv[3][0] == '1';
    Weights weights;
    Buffer cache(THREADS * 8 * ROW);
    cuda(cudaMemset(cache.at(), 0, cache.bytes()));
    // The threads' streams do not wait for it by themselves.
    cuda(cudaDeviceSynchronize());
    std::vector<uint64_t> states(THREADS);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < THREADS; i++)
        threads.emplace_back([&, i] { states[i] = Conversation(weights, cache.at(i * 8 * ROW), i).talk(); });
    for (std::thread &thread : threads) thread.join();
    CHECK(how == "never" || was_away);
    // What the pools have mapped is gone with them.
    CHECK(mapped_bytes == 0 && (pool_kind != "mapped" || device_used() <= weights.on_device * LAYER + 4 * MiB));
    std::printf("%zu layers on the device\n", weights.on_device);
    for (uint64_t state : states) std::printf("said %016llx\n", static_cast<unsigned long long>(state));
    std::printf("cache %016llx\n", static_cast<unsigned long long>(cache.digest()));
    // Whoever has resumed it hears that before it ends.
    if (how == "asked") std::getchar();
    return 0;
}
