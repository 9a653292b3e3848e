// Stands in for libcudart.so.13 on a machine without a GPU: what nvcc built is linked to this library instead, and its
// kernels run, from the PTX inside of it, in the simulator.
//
// Streams are queues. Schedule `eager` runs an order when it is given, `lazy` not before the host waits for it, `rand`
// somewhere in between. Whatever the schedule, every two orders that touch the same bytes must be ordered by streams
// and events, and the host may not touch registered memory of a pending order: its pages are taken away meanwhile.
//
// sim_reset, sim_findings, sim_calls and sim_fail_at are for the tests, who call them through ctypes.
#include <cuda_runtime_api.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "fatbin.hpp"
#include "machine.hpp"

namespace sim {

namespace {

using Clock = std::map<int, u64>;  // of each stream: the number of the last order known to be over

struct Range {
    u64 begin, end;
    bool write;
};

struct Order {
    std::string what;
    int stream;
    u64 number;
    Clock after;                              // what is over before it begins
    std::vector<std::pair<int, u64>> awaits;  // orders of other streams
    std::function<void(Order&)> run;
    std::vector<Range> ranges;
};

struct StreamState {
    int id = 0;
    bool blocking = true;  // waits for the default stream and it for this one
    bool alive = true;
    u64 given = 0, over = 0;
    std::vector<std::shared_ptr<Order>> pending;
    Clock clock;
};

struct EventState {
    bool recorded = false;
    int stream = 0;
    u64 number = 0;
    Clock clock;
};

struct Binary {
    std::map<int, std::string> texts;
    std::map<int, std::unique_ptr<Module>> modules;
    bool any = false;  // one text for every architecture: loaded at run time
};

struct KernelName {
    Binary* binary;
    std::string name;
};

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};

constexpr int kDevices = 2;
thread_local int current_device = 0;

enum class Schedule { eager, lazy, random };

constexpr u64 kDeviceBytes = 64ull << 30;  // of address space; nothing of it is there for the host

struct World {
    std::recursive_mutex mutex;
    AddressSpace memory;
    u64 device_begin = 0, device_next = 0, device_limit = ~0ull, device_used = 0;
    u64 page = static_cast<u64>(sysconf(_SC_PAGESIZE));
    std::map<int, StreamState> streams;
    int next_stream = 1;
    std::set<EventState*> events;
    Clock host;
    std::vector<std::shared_ptr<Order>> history;
    std::vector<std::string> findings;
    std::map<u64, u64> guarded;  // pages without access, and up to where
    std::vector<std::unique_ptr<Binary>> binaries;
    std::map<const void*, KernelName> kernels;
    std::vector<std::unique_ptr<KernelName>> loaded;  // of libraries that were loaded at run time
    Schedule schedule = Schedule::lazy;
    u64 seed = 0;
    std::mt19937_64 random;
    int arch = 0;
    cudaError_t last = cudaSuccess, sticky = cudaSuccess;
    i64 calls = 0, fail_at = 0, waits = 0;
    cudaError_t failure = cudaErrorUnknown;
    u64 launches = 0, instructions = 0;
    std::map<std::string, u64> runs;  // of each kernel
    std::string report;
};

void on_fault(int, siginfo_t*, void*);

// Never destroyed: modules deregister themselves at exit, in any order.
World& world() {
    static World* made = [] {
        auto* w = new World;
        w->device_begin = reinterpret_cast<u64>(
            mmap(nullptr, kDeviceBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        w->device_next = w->device_begin + (1 << 20);
        w->streams[0] = {};
        return w;
    }();
    return *made;
}

using Lock = std::lock_guard<std::recursive_mutex>;

void find(const std::string& what) {
    World& w = world();
    if (std::find(w.findings.begin(), w.findings.end(), what) == w.findings.end()) w.findings.push_back(what);
}

cudaError_t give(cudaError_t error) {
    World& w = world();
    if (w.sticky != cudaSuccess) error = w.sticky;
    if (error != cudaSuccess) w.last = error;
    return error;
}

// Every call that may fail counts; one of them is made to fail. True where it is this one.
bool fails(cudaError_t& error) {
    World& w = world();
    ++w.calls;
    error = w.sticky;
    if (w.fail_at != 0 && w.calls == w.fail_at) error = w.failure;
    if (error != cudaSuccess) w.last = error;
    return error != cudaSuccess;
}

StreamState* stream_of(cudaStream_t handle) {
    const auto id = static_cast<int>(reinterpret_cast<u64>(handle) >> 8);
    auto found = world().streams.find(id);
    return found == world().streams.end() || !found->second.alive ? nullptr : &found->second;
}

void merge(Clock& into, const Clock& from) {
    for (const auto& [stream, number] : from) into[stream] = std::max(into[stream], number);
}

// --- pages that the host may not touch

void on_fault(int signal_number, siginfo_t* info, void*) {
    World& w = world();
    const auto at = reinterpret_cast<u64>(info->si_addr);
    for (const auto& [begin, end] : w.guarded) {
        if (at < begin || at >= end) continue;
        find("HOST touches registered memory of an order that was not waited for");
        mprotect(reinterpret_cast<void*>(at / w.page * w.page), w.page, PROT_READ | PROT_WRITE);
        return;
    }
    if (at >= w.device_begin && at < w.device_begin + kDeviceBytes) {
        static const char text[] = "the host dereferenced a device pointer\n";
        [[maybe_unused]] ssize_t written = write(2, text, sizeof text - 1);
    }
    signal(signal_number, SIG_DFL);
}

void lift_guards() {
    for (const auto& [begin, end] : world().guarded) {
        mprotect(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE);
    }
    world().guarded.clear();
}

void guard_pending() {
    World& w = world();
    for (const auto& [id, stream] : w.streams) {
        for (const auto& order : stream.pending) {
            for (const Range& range : order->ranges) {
                Allocation* found = w.memory.find(range.begin);
                if (found == nullptr || found->kind != Kind::pinned) continue;
                const u64 begin = (range.begin + w.page - 1) / w.page * w.page, end = range.end / w.page * w.page;
                if (begin >= end) continue;
                const bool none = range.write || w.guarded.count(begin) != 0;
                mprotect(reinterpret_cast<void*>(begin), end - begin, none ? PROT_NONE : PROT_READ);
                w.guarded[begin] = std::max(w.guarded[begin], end);
            }
        }
    }
}

// --- orders

bool is_before(const Order& one, const Order& other) {
    auto found = other.after.find(one.stream);
    return found != other.after.end() && found->second >= one.number;
}

void check_order(const Order& now) {
    for (const auto& before : world().history) {
        if (before->stream == now.stream || is_before(*before, now) || is_before(now, *before)) continue;
        for (const Range& a : before->ranges) {
            for (const Range& b : now.ranges) {
                if (!(a.write || b.write) || a.begin >= b.end || b.begin >= a.end) continue;
                find("STREAMS: '" + before->what + "' and '" + now.what + "' touch the same bytes and are not ordered");
                return;
            }
        }
    }
}

void run_until(StreamState& stream, u64 number);

// What the host knows to be over comes before whatever it will still give, once nothing given earlier is left.
void forget_the_past() {
    World& w = world();
    for (const auto& [id, stream] : w.streams) {
        if (!stream.pending.empty()) return;
    }
    auto over = [&](const auto& order) { return w.host[order->stream] >= order->number; };
    w.history.erase(std::remove_if(w.history.begin(), w.history.end(), over), w.history.end());
}

void run_first(StreamState& stream) {
    World& w = world();
    auto order = stream.pending.front();
    for (const auto& [other, number] : order->awaits) run_until(w.streams[other], number);
    if (stream.pending.empty() || stream.pending.front() != order) return;
    lift_guards();
    stream.pending.erase(stream.pending.begin());
    if (w.sticky == cudaSuccess) {
        try {
            order->run(*order);
        } catch (const Fault& fault) {
            find(fault.what());
            w.sticky = cudaErrorIllegalAddress;
        }
        check_order(*order);
        w.history.push_back(order);
    }
    stream.over = order->number;
    forget_the_past();
    guard_pending();
}

void run_until(StreamState& stream, u64 number) {
    while (stream.over < number && !stream.pending.empty()) run_first(stream);
}

void run_some() {
    World& w = world();
    if (w.schedule != Schedule::random) return;
    for (auto& [id, stream] : w.streams) {
        while (!stream.pending.empty() && (w.random() & 1)) run_first(stream);
    }
}

// The host waits.
void wait_for(StreamState& stream, u64 number) {
    World& w = world();
    ++w.waits;
    run_until(stream, number);
    w.host[stream.id] = std::max(w.host[stream.id], number);
}

cudaError_t enqueue(StreamState* stream, const std::string& what, std::vector<Range> ranges,
                    std::function<void(Order&)> run, const EventState* awaits = nullptr) {
    World& w = world();
    if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
    auto order = std::make_shared<Order>();
    order->what = what;
    order->stream = stream->id;
    order->ranges = std::move(ranges);
    order->run = std::move(run);
    merge(order->after, stream->clock);
    merge(order->after, w.host);
    if (awaits != nullptr) {
        merge(order->after, awaits->clock);
        order->awaits.push_back({awaits->stream, awaits->number});
    }
    for (auto& [id, other] : w.streams) {  // the default stream and the blocking ones wait for each other
        if (id == stream->id || !stream->blocking || !other.blocking || (id != 0 && stream->id != 0)) continue;
        merge(order->after, other.clock);
        order->awaits.push_back({id, other.given});
    }
    order->number = ++stream->given;
    order->after[stream->id] = order->number;
    stream->clock = order->after;
    stream->pending.push_back(order);
    if (w.schedule == Schedule::eager) {
        run_until(*stream, order->number);
    } else {
        lift_guards();
        guard_pending();
        run_some();
    }
    return give(cudaSuccess);
}

// --- copies

Kind* kind_of(const void* at) {
    Allocation* found = world().memory.find(reinterpret_cast<u64>(at));
    return found == nullptr ? nullptr : &found->kind;
}

bool is_device(const void* at) {
    const auto number = reinterpret_cast<u64>(at);
    return number >= world().device_begin && number < world().device_begin + kDeviceBytes;
}

u8* bytes_at(const void* at, u64 bytes, bool write, const std::string& what) {
    Allocation* found = world().memory.find(reinterpret_cast<u64>(at));
    const u64 number = reinterpret_cast<u64>(at);
    if (found == nullptr) {
        if (is_device(at)) throw Fault("BOUNDS: " + what + " where there is no device memory");
        return reinterpret_cast<u8*>(number);
    }
    if (found->kind == Kind::freed) throw Fault("FREED memory: " + what);
    if (!found->holds(number, bytes)) throw Fault("BOUNDS: " + what + " beyond an allocation or a registered segment");
    const u64 offset = number - found->base;
    if (!found->written.empty()) {
        const auto begin = found->written.begin() + static_cast<i64>(offset), end = begin + static_cast<i64>(bytes);
        if (write)
            std::fill(begin, end, true);
        else if (std::find(begin, end, false) != end)
            find("UNINITIALISED device memory is read by a " + what);
    }
    return found->host + offset;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle) {
    StreamState* stream = stream_of(handle);
    if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
    if (bytes == 0) return give(cudaSuccess);
    const bool up = is_device(to), down = is_device(from);
    const bool pinned_from = kind_of(from) != nullptr && *kind_of(from) == Kind::pinned;
    const bool pinned_to = kind_of(to) != nullptr && *kind_of(to) == Kind::pinned;
    const std::string what = std::string("copy of ") + std::to_string(bytes) + " bytes " +
                             (up && down ? "on the device"
                              : up       ? "to the device"
                              : down     ? "to the host"
                                         : "on the host");
    std::vector<Range> ranges;
    const auto a = reinterpret_cast<u64>(from), b = reinterpret_cast<u64>(to);
    if (down || pinned_from) ranges.push_back({a, a + bytes, false});
    if (up || pinned_to) ranges.push_back({b, b + bytes, true});
    std::shared_ptr<std::vector<u8>> staged;  // memory that is not registered is read at once
    if (!down && !pinned_from) {
        staged = std::make_shared<std::vector<u8>>(static_cast<const u8*>(from), static_cast<const u8*>(from) + bytes);
    }
    const cudaError_t error = enqueue(stream, what, ranges, [=](Order&) {
        const u8* source = staged ? staged->data() : bytes_at(from, bytes, false, what);
        std::memmove(bytes_at(to, bytes, true, what), source, bytes);
    });
    if (down && !up && !pinned_to) wait_for(*stream, stream->given);  // such a copy is over when the call returns
    return error;
}

// --- launches

Module& module_of(Binary& binary) {
    if (binary.texts.empty()) throw Fault("the program holds no PTX: build it with a compute_XX target");
    auto at = binary.texts.find(world().arch);
    if (world().arch == 0 || binary.any) at = std::prev(binary.texts.end());
    if (at == binary.texts.end()) throw Fault("the program holds no PTX of compute_" + std::to_string(world().arch));
    auto& made = binary.modules[at->first];
    if (!made) made = std::make_unique<Module>(at->second);
    return *made;
}

cudaError_t launch(const KernelName& name, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t handle) {
    World& w = world();
    const Kernel* kernel;
    try {
        kernel = &module_of(*name.binary).kernel(name.name);
    } catch (const Fault& fault) {
        find(fault.what());
        return give(cudaErrorInvalidKernelImage);
    }
    if (shared != 0) {
        find("LAUNCH: dynamic shared memory is not simulated");
        return give(cudaErrorInvalidValue);
    }
    const u64 threads = u64{block.x} * block.y * block.z;
    if (threads == 0 || threads > static_cast<u64>(kernel->threads_max) || grid.x == 0 || grid.y == 0 || grid.z == 0) {
        find("LAUNCH: a bad configuration of " + name.name);
        return give(cudaErrorInvalidConfiguration);
    }
    auto order = std::make_shared<Launch>();
    *order = {{grid.x, grid.y, grid.z},
              {block.x, block.y, block.z},
              std::vector<u8>(kernel->parameter_bytes),
              current_device,
              w.seed};
    for (size_t i = 0; i < kernel->parameters.size(); ++i) {
        std::memcpy(order->parameters.data() + kernel->parameters[i].offset, arguments[i], kernel->parameters[i].bytes);
    }
    ++w.launches;
    ++w.runs[name.name];
    return enqueue(stream_of(handle), "kernel " + name.name, {}, [=](Order& self) {
        Outcome outcome;
        auto collect = [&] {
            for (const std::string& one : outcome.findings) find(one);
            world().instructions += outcome.instructions;
            for (const Access& access : outcome.accesses) {
                self.ranges.push_back({access.page * kPage, (access.page + 1) * kPage, access.write});
            }
        };
        try {
            Machine(world().memory, *kernel, *order, outcome).run();
        } catch (...) {
            collect();
            throw;
        }
        collect();
    });
}

thread_local std::vector<Configuration> configurations;

}  // namespace

}  // namespace sim

using namespace sim;

#define SIM_CALL              \
    Lock lock(world().mutex); \
    cudaError_t injected;     \
    if (fails(injected)) return injected

// A wait that fails says that the device is lost: nothing that was enqueued runs any more.
#define SIM_WAIT              \
    Lock lock(world().mutex); \
    cudaError_t injected;     \
    if (fails(injected)) return world().sticky = injected

extern "C" {

// --- for the tests

// A fresh device. `schedule`: -2 eager, -1 lazy, else random by this seed; `arch` 0: the newest PTX there is.
void sim_reset(i64 schedule, int arch, u64 device_bytes) {
    World& w = world();
    Lock lock(w.mutex);
    lift_guards();
    for (auto& [base, allocation] : w.memory.all()) {
        if (allocation.kind == Kind::device) std::free(allocation.host);
    }
    w.memory = {};
    w.streams.clear();
    w.streams[0] = {};
    for (EventState* event : w.events) delete event;
    w.events.clear();
    w.host.clear();
    w.history.clear();
    w.findings.clear();
    w.schedule = schedule == -2 ? Schedule::eager : schedule == -1 ? Schedule::lazy : Schedule::random;
    w.seed = schedule < 0 ? 0 : static_cast<u64>(schedule) + 1;
    w.random.seed(w.seed);
    w.arch = arch;
    w.device_next = w.device_begin + (1 << 20);
    w.device_limit = device_bytes;
    w.device_used = 0;
    w.last = w.sticky = cudaSuccess;
    w.calls = w.fail_at = w.waits = 0;
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
}

// The n-th call from now on fails, once; n = 0: none.
void sim_fail_at(i64 n, int error) {
    Lock lock(world().mutex);
    world().calls = 0;
    world().fail_at = n;
    world().failure = static_cast<cudaError_t>(error);
}

int sim_current_device() {
    return current_device;
}

i64 sim_calls() {
    Lock lock(world().mutex);
    return world().calls;
}

// How often the host waited for a stream; a question whether an event is over counts where it is.
i64 sim_waits() {
    Lock lock(world().mutex);
    return world().waits;
}

// All that was found, one a line; `whole`: also what was never given back.
const char* sim_findings(int whole) {
    World& w = world();
    Lock lock(w.mutex);
    auto all = w.findings;
    if (whole) {
        for (const auto& [base, one] : w.memory.all()) {
            if (one.kind == Kind::device)
                all.push_back("LEAK: device memory of " + std::to_string(one.bytes) + " bytes");
            if (one.kind == Kind::pinned)
                all.push_back("LEAK: registered memory of " + std::to_string(one.bytes) + " bytes");
        }
        for (const auto& [id, stream] : w.streams) {
            if (id != 0 && stream.alive) all.push_back("LEAK: a stream");
            if (!stream.pending.empty() && w.sticky == cudaSuccess)
                all.push_back("LEAK: orders that nobody waited for");
        }
        if (!w.events.empty()) all.push_back("LEAK: an event");
    }
    w.report.clear();
    for (const std::string& one : all) w.report += one + "\n";
    return w.report.c_str();
}

// "kernel count" for each kernel that ran since the library was loaded, then launches and instructions.
const char* sim_totals() {
    World& w = world();
    Lock lock(w.mutex);
    w.report.clear();
    for (const auto& [name, count] : w.runs) w.report += name + " " + std::to_string(count) + "\n";
    w.report += "launches " + std::to_string(w.launches) + "\ninstructions " + std::to_string(w.instructions) + "\n";
    return w.report.c_str();
}

// --- what nvcc's own start-up code calls

void** __cudaRegisterFatBinary(void* wrapper) {
    struct Wrapper {
        int magic, version;
        const u8* data;
    };
    Lock lock(world().mutex);
    world().binaries.push_back(std::make_unique<Binary>());
    world().binaries.back()->texts = ptx_in(static_cast<Wrapper*>(wrapper)->data);
    return reinterpret_cast<void**>(world().binaries.back().get());
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) {
    return 1;
}

void __cudaRegisterFunction(void** binary, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    Lock lock(world().mutex);
    world().kernels[stub] = {reinterpret_cast<Binary*>(binary), name};
    world().runs[name];  // counted also while it never runs
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    const Configuration& top = configurations.back();
    *grid = top.grid;
    *block = top.block;
    *shared = top.shared;
    *static_cast<cudaStream_t*>(stream) = top.stream;
    configurations.pop_back();
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
    Lock lock(world().mutex);
    auto found = world().kernels.find(stub);
    if (found == world().kernels.end()) return give(cudaErrorInvalidDeviceFunction);
    *kernel = reinterpret_cast<cudaKernel_t>(&found->second);
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
    SIM_CALL;
    return launch(*reinterpret_cast<KernelName*>(kernel), grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
    SIM_CALL;
    for (const auto& one : world().loaded) {
        if (one.get() == stub) return launch(*one, grid, block, arguments, shared, stream);
    }
    auto found = world().kernels.find(stub);
    if (found == world().kernels.end()) return give(cudaErrorInvalidDeviceFunction);
    return launch(found->second, grid, block, arguments, shared, stream);
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void* code, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
    SIM_CALL;
    auto made = std::make_unique<Binary>();
    made->texts[0] = static_cast<const char*>(code);
    made->any = true;
    *library = reinterpret_cast<cudaLibrary_t>(made.get());
    world().binaries.push_back(std::move(made));
    return cudaSuccess;
}

cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t library, const char* name) {
    SIM_CALL;
    world().loaded.push_back(std::make_unique<KernelName>(KernelName{reinterpret_cast<Binary*>(library), name}));
    *kernel = reinterpret_cast<cudaKernel_t>(world().loaded.back().get());
    return cudaSuccess;
}

// --- the runtime

cudaError_t cudaGetDeviceCount(int* count) {
    SIM_CALL;
    *count = kDevices;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    SIM_CALL;
    if (device < 0 || device >= kDevices) return give(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    SIM_CALL;
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    SIM_CALL;
    if (attribute != cudaDevAttrMultiProcessorCount) return give(cudaErrorInvalidValue);
    *value = 2;  // few, so that the kernels' loops over a grid go round
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
    SIM_CALL;
    World& w = world();
    if (w.device_used + bytes > w.device_limit) return give(cudaErrorMemoryAllocation);
    const u64 at = (w.device_next + 511) / 512 * 512;
    w.device_next = at + bytes + 4096;  // a gap behind each, so that running over its end is seen
    w.device_used += bytes;
    auto* host = static_cast<u8*>(std::malloc(bytes + 1));
    std::memset(host, 0xA5, bytes);
    w.memory.add(at, bytes, host, Kind::device).device = current_device;
    *memory = reinterpret_cast<void*>(at);
    return give(cudaSuccess);
}

// Waits for everything that was enqueued, as the real one does.
cudaError_t cudaFree(void* memory) {
    Lock lock(world().mutex);
    World& w = world();
    if (memory == nullptr) return give(cudaSuccess);
    for (auto& [id, stream] : w.streams) wait_for(stream, stream.given);
    Allocation* found = w.memory.find(reinterpret_cast<u64>(memory));
    if (found == nullptr || found->base != reinterpret_cast<u64>(memory) || found->kind != Kind::device) {
        find("cudaFree of what is no device memory");
        return give(cudaErrorInvalidValue);
    }
    w.device_used -= found->bytes;
    found->kind = Kind::freed;
    std::free(found->host);
    found->host = nullptr;
    return give(cudaSuccess);
}

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
    SIM_CALL;
    World& w = world();
    if (bytes > (256ull << 20)) find("cudaHostRegister of more than 256 MiB in one call");
    if (w.memory.meets(reinterpret_cast<u64>(memory), bytes)) return give(cudaErrorHostMemoryAlreadyRegistered);
    w.memory.add(reinterpret_cast<u64>(memory), bytes, static_cast<u8*>(memory), Kind::pinned);
    return give(cudaSuccess);
}

cudaError_t cudaHostUnregister(void* memory) {
    Lock lock(world().mutex);
    World& w = world();
    Allocation* found = w.memory.find(reinterpret_cast<u64>(memory));
    if (found == nullptr || found->base != reinterpret_cast<u64>(memory) || found->kind != Kind::pinned) {
        return give(cudaErrorHostMemoryNotRegistered);
    }
    for (const auto& [id, stream] : w.streams) {
        for (const auto& order : stream.pending) {
            for (const Range& range : order->ranges) {
                if (w.sticky == cudaSuccess && range.begin < found->base + found->bytes && found->base < range.end) {
                    find("cudaHostUnregister while '" + order->what + "' is pending on that memory");
                }
            }
        }
    }
    for (auto& [id, stream] : w.streams) run_until(stream, stream.given);
    lift_guards();
    w.memory.forget(found->base);
    return give(cudaSuccess);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    SIM_CALL;
    return copy(to, from, bytes, stream);
}

// No function of the runtime may be called from there: it runs with this library locked, as if by a thread of its own.
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* given) {
    SIM_CALL;
    return enqueue(stream_of(handle), "host function", {}, [=](Order&) { function(given); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    SIM_CALL;
    World& w = world();
    const int id = w.next_stream++;
    w.streams[id].id = id;
    w.streams[id].blocking = flags != cudaStreamNonBlocking;
    *stream = reinterpret_cast<cudaStream_t>(static_cast<u64>(id) << 8);
    return give(cudaSuccess);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    Lock lock(world().mutex);
    StreamState* stream = stream_of(handle);
    if (stream == nullptr || handle == nullptr) return give(cudaErrorInvalidResourceHandle);
    stream->alive = false;
    return give(cudaSuccess);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    SIM_WAIT;
    StreamState* stream = stream_of(handle);
    if (stream == nullptr) return give(cudaErrorInvalidResourceHandle);
    wait_for(*stream, stream->given);
    merge(world().host, stream->clock);
    return give(cudaSuccess);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    SIM_CALL;
    auto* state = reinterpret_cast<EventState*>(event);
    if (world().events.count(state) == 0) return give(cudaErrorInvalidResourceHandle);
    if (!state->recorded) {
        find("cudaStreamWaitEvent of an event that was never recorded: nothing waits");
        return give(cudaSuccess);
    }
    return enqueue(stream_of(handle), "wait for an event", {}, [](Order&) {}, state);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    SIM_CALL;
    auto* made = new EventState;
    world().events.insert(made);
    *event = reinterpret_cast<cudaEvent_t>(made);
    return give(cudaSuccess);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Lock lock(world().mutex);
    auto* state = reinterpret_cast<EventState*>(event);
    if (world().events.erase(state) == 0) return give(cudaErrorInvalidResourceHandle);
    delete state;
    return give(cudaSuccess);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    SIM_CALL;
    auto* state = reinterpret_cast<EventState*>(event);
    StreamState* stream = stream_of(handle);
    if (stream == nullptr || world().events.count(state) == 0) return give(cudaErrorInvalidResourceHandle);
    const cudaError_t error = enqueue(stream, "event", {}, [](Order&) {});
    state->recorded = true;
    state->stream = stream->id;
    state->number = stream->given;
    state->clock = stream->clock;
    return error;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    SIM_WAIT;
    auto* state = reinterpret_cast<EventState*>(event);
    if (world().events.count(state) == 0) return give(cudaErrorInvalidResourceHandle);
    if (!state->recorded) {
        find("cudaEventSynchronize of an event that was never recorded: nothing is waited for");
        return give(cudaSuccess);
    }
    wait_for(world().streams[state->stream], state->number);
    merge(world().host, state->clock);
    return give(cudaSuccess);
}

// In a lazy world it takes a few questions until something is over.
cudaError_t cudaEventQuery(cudaEvent_t event) {
    SIM_WAIT;
    World& w = world();
    auto* state = reinterpret_cast<EventState*>(event);
    if (w.events.count(state) == 0) return give(cudaErrorInvalidResourceHandle);
    if (!state->recorded) return give(cudaSuccess);
    StreamState& stream = w.streams[state->stream];
    run_some();
    if (stream.over < state->number && (w.random() & 3)) return cudaErrorNotReady;
    wait_for(stream, state->number);
    merge(w.host, state->clock);
    return give(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* at) {
    SIM_CALL;
    Kind* kind = kind_of(at);
    *found = {};
    found->device = kind == nullptr ? 0 : world().memory.find(reinterpret_cast<u64>(at))->device;
    found->type = kind == nullptr         ? cudaMemoryTypeUnregistered
                  : *kind == Kind::device ? cudaMemoryTypeDevice
                  : *kind == Kind::pinned ? cudaMemoryTypeHost
                                          : cudaMemoryTypeUnregistered;
    return give(cudaSuccess);
}

cudaError_t cudaGetLastError() {
    Lock lock(world().mutex);
    const cudaError_t error = world().sticky != cudaSuccess ? world().sticky : world().last;
    world().last = cudaSuccess;
    return error;
}

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "cudaSuccess";
        case cudaErrorMemoryAllocation:
            return "cudaErrorMemoryAllocation";
        case cudaErrorIllegalAddress:
            return "cudaErrorIllegalAddress";
        case cudaErrorInvalidResourceHandle:
            return "cudaErrorInvalidResourceHandle";
        default:
            return "cudaError (simulated)";
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    return cudaGetErrorName(error);
}

}  // extern "C"
