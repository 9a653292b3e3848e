// Runs one launch, thread by thread, and looks at every access: does the memory exist, is it aligned, was it written,
// has another thread touched it without a barrier in between, do barriers and shuffles meet.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <set>
#include <unordered_map>

#include "ptx.hpp"

namespace sim {

struct Launch {
    u32 grid[3], block[3];
    std::vector<u8> parameters;
    int device = 0;  // memory of another one is out of reach
    u64 seed = 0;    // 0: blocks and threads in order, each as far as it gets; else shuffled, in turns of random length
};

struct Access {
    u64 page;  // address / kPage
    bool write;
    bool operator<(const Access& other) const { return page != other.page ? page < other.page : write < other.write; }
};
constexpr u64 kPage = 256;

struct Outcome {
    std::vector<std::string> findings;
    std::set<Access> accesses;
    u64 instructions = 0;
};

class Machine {
  public:
    Machine(AddressSpace& memory, const Kernel& kernel, const Launch& launch, Outcome& outcome);
    // Fault where the launch cannot go on; what it found until then is in the outcome.
    void run();

  private:
    enum class State : u8 { running, at_barrier, at_warp, ended };

    struct Thread {
        std::vector<u64> registers;
        std::vector<u8> local;
        u32 id[3];
        u32 number;  // in its block
        int at = 0;
        State state = State::running;
        u32 warp_epoch = 0;
    };

    // Who touched a byte: thread 0 is nobody. Ordered by the barriers that were passed since.
    struct Touch {
        u64 thread = 0;
        u32 barrier_epoch = 0, warp_epoch = 0;
        bool atomic = false;
    };
    struct Shadow {
        Touch write, read, other_read;
    };

    void run_block(u64 block);
    void start_threads();
    bool step_all();
    void step(Thread& thread, long turns);
    bool execute(Thread& thread, const Instruction& one);
    void arithmetic(Thread& thread, const Instruction& one);
    void move(Thread& thread, const Instruction& one);
    void load(Thread& thread, const Instruction& one);
    void store(Thread& thread, const Instruction& one);
    void set_predicate(Thread& thread, const Instruction& one);
    void atomic(Thread& thread, const Instruction& one);
    void meet_in_warps();
    bool warp_meets(u32 first, u32 lane);
    void exchange(u32 first, u32 mask, const Instruction& one);
    bool meet_at_barrier();

    u8* resolve(Thread& thread, const Instruction& one, u64 at, u64 bytes, bool write, bool is_atomic);
    void check_race(Thread& thread, const Instruction& one, Shadow& shadow, u64 at, bool write, bool is_atomic);
    bool ordered(const Touch& before, u64 thread, const Thread& now) const;
    u64 global_number(const Thread& thread) const { return block_ * threads_in_block_ + thread.number + 1; }

    void find(const Thread& thread, const Instruction& one, const std::string& what);
    [[noreturn]] void fail(const Thread& thread, const Instruction& one, const std::string& what);
    std::string where(const Thread& thread, const Instruction& one) const;

    u64 read(const Thread& thread, const Operand& operand) const;
    u64 read(const Thread& thread, const Operand& operand, Type type) const;  // extended as its type says
    void write(Thread& thread, const Operand& operand, u64 value);
    u64 special(const Thread& thread, Special which) const;

    AddressSpace& memory_;
    const Kernel& kernel_;
    const Launch& launch_;
    Outcome& outcome_;
    const u64 threads_in_block_;
    std::mt19937_64 random_;
    std::vector<Thread> threads_;
    std::vector<u8> shared_;
    std::vector<bool> shared_written_;
    std::vector<Shadow> shared_shadow_;
    std::unordered_map<u64, std::unique_ptr<Shadow[]>> global_shadow_;  // by page
    std::set<std::string> found_;
    u32 barrier_epoch_ = 0;
    u64 block_ = 0;
    u32 block_at_[3] = {0, 0, 0};
    Allocation* last_ = nullptr;
};

}  // namespace sim
