// A C++ program that has never heard of Sire: buffers with destructors, exceptions through frames that call CUDA, memory of static and of thread-local
// objects. It prints what it has computed. argv: never | paused (all of its memory goes and comes back between any two steps) | left (the same, and its
// memory is paused when it ends).
#include "program.hpp"
#include <future>
#include <map>
#include <memory>
#include <thread>

static std::string how;

// Everything goes, and comes back.
static void interrupt() {
    if (how == "never") return;
    CHECK(OF_SIRE(sire_pause)(nullptr, nullptr, nullptr) == SIRE_STATUS_OK);
    CHECK(device_used() == 0);
    CHECK(OF_SIRE(sire_resume)(nullptr, nullptr, nullptr) == SIRE_STATUS_OK);
}

// The first and the last to be destroyed: made before main, and when it is first asked for.
struct Static {
    explicit Static(const char *said) : memory(3 * MiB), said(said) { memory.write(1); }
    ~Static() {
        memory = Buffer();
        if (said && write(1, said, std::strlen(said)) < 0) _exit(9);
    }
    Buffer memory;
    const char *said;
};
static Static made_before_main("the end\n");
static Static &made_later() {
    static Static later(nullptr);
    return later;
}

static void digest(const char *what, const Buffer &buffer) { std::printf("%s %016llx\n", what, static_cast<unsigned long long>(buffer.digest())); }

static void containers() {
    std::map<std::string, Buffer> named;
    std::vector<Buffer> many;
    uint64_t used = device_used();
    for (unsigned i = 0; i < 64; i++) {
        many.emplace_back(1000 + i);
        many.back().write(i);
    }
    // Small pieces share memory: no 2 MiB for each.
    CHECK(device_used() - used <= 4 * MiB);
    named.emplace("weights", Buffer(5 * MiB)).first->second.write(7);
    std::unique_ptr<Buffer[]> array(new Buffer[3]);
    for (unsigned i = 0; i < 3; i++) (array[i] = Buffer((i + 1) * 700 * KiB)).write(70 + i);
    interrupt();
    many.erase(many.begin() + 5, many.begin() + 20);
    Buffer moved = std::move(many[3]);
    for (const Buffer &buffer : many)
        if (buffer.bytes() != 0) digest("piece", buffer);
    digest("moved", moved);
    digest("named", named.at("weights"));
    digest("array", array[2]);
}

// The third member does not fit: the first two are given back by the language.
struct Model {
    Buffer first{4 * MiB}, second{4 * MiB}, third{size_t(1) << 42};
};

// A constructor of an array's element throws: those that were there go.
struct Element {
    static int left;
    Buffer memory;
    Element() : memory(--left < 0 ? throw std::logic_error("no more elements") : 2 * MiB) {}
};
int Element::left = 4;

static int deep(int level) {
    Buffer here((level + 1) * 300 * KiB);
    here.write(level);
    if (level == 6) throw std::runtime_error("at the bottom");
    int below = deep(level + 1);
    digest("never said", here);
    return below;
}

template <class Error, class Body> static void throws(Body body) {
    uint64_t before = device_used();
    bool caught = false;
    try {
        body();
    } catch (const Error &) {
        caught = true;
        // Memory that a handler takes is as good as any.
        Buffer meanwhile(MiB);
        meanwhile.write(3);
        interrupt();
        digest("in the handler", meanwhile);
    }
    CHECK(caught);
    auto trim = OF_SIRE(sire_trim);
    if (trim) CHECK(trim(nullptr, nullptr) == SIRE_STATUS_OK);
    CHECK(device_used() <= before);
}

static void exceptions() {
    throws<OutOfMemory>([] { Model model; });
    throws<std::logic_error>([] { std::unique_ptr<Element[]> elements(new Element[9]); });
    throws<std::runtime_error>([] { deep(0); });
    throws<std::exception>([] {
        try {
            deep(3);
        } catch (const std::runtime_error &) {
            Buffer again(MiB);
            std::throw_with_nested(std::invalid_argument("from a handler"));
        }
    });
    // Out of one thread into another.
    throws<OutOfMemory>([] { std::async(std::launch::async, [] { return Model().first.bytes(); }).get(); });
}

static void threads() {
    static thread_local Buffer of_this_thread;
    std::vector<std::thread> all;
    std::vector<uint64_t> digests(4);
    for (unsigned i = 0; i < 4; i++)
        all.emplace_back([i, &digests] {
            of_this_thread = Buffer(512 * KiB);
            of_this_thread.write(i);
            digests[i] = of_this_thread.digest();
        });
    for (std::thread &thread : all) thread.join();
    for (uint64_t each : digests) std::printf("thread %016llx\n", static_cast<unsigned long long>(each));
    interrupt();
}

// What a program does that knows Sire: a region that ends with its block, however that ends.
class Region {
public:
    explicit Region(const char *tag) {
        CHECK(OF_SIRE(sire_region_open)(tag, nullptr, &region_) == SIRE_STATUS_OK);
        CHECK(OF_SIRE(sire_region_enter)(region_, 0) == SIRE_STATUS_OK);
    }
    ~Region() { CHECK(OF_SIRE(sire_region_leave)(region_) == SIRE_STATUS_OK); }

private:
    uint32_t region_ = 0;
};

static void regions() {
    uint32_t before = 0, after = 1;
    CHECK(OF_SIRE(sire_region_current)(&before) == SIRE_STATUS_OK);
    try {
        Region outer("outer"), inner("inner");
        Buffer memory(MiB);
        CHECK(OF_SIRE(sire_owns)(memory.at()));
        deep(2);
    } catch (const std::runtime_error &) {
    }
    CHECK(OF_SIRE(sire_region_current)(&after) == SIRE_STATUS_OK && before == after);
    // A block of the program's own that is asked for during a pause throws and catches: the pause is refused, as it says.
    sire_pause_options options = {};
    options.struct_size = sizeof options;
    options.dead_ranges = [](void *, const uint32_t *, size_t, const sire_range **, size_t *) -> int32_t {
        try {
            Buffer none(size_t(1) << 42);
        } catch (const std::exception &) {
            return SIRE_STATUS_BUSY;
        }
        return SIRE_STATUS_OK;
    };
    CHECK(OF_SIRE(sire_pause)(nullptr, &options, nullptr) == SIRE_STATUS_BUSY);
}

int main(int, char **argv) {
    alarm(60);
    how = argv[1];
    containers();
    exceptions();
    threads();
    made_later().memory.write(9);
    if (how != "never") regions();
    interrupt();
    digest("before main", made_before_main.memory);
    digest("later", made_later().memory);
    std::fflush(stdout);
    if (how == "left") CHECK(OF_SIRE(sire_pause)(nullptr, nullptr, nullptr) == SIRE_STATUS_OK);
    return 0;
}
