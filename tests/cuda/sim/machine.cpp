#include "machine.hpp"

#include <algorithm>
#include <cstring>

namespace sim {

namespace {

constexpr u64 kInstructionsMax = 2'000'000'000;  // of one launch: more is a loop without end
constexpr size_t kFindingsMax = 20;
constexpr u64 kSharedBytesMax = 48 * 1024;

u64 cut(u64 value, int bytes) {
    return bytes >= 8 ? value : value & ((1ull << (8 * bytes)) - 1);
}

u64 extended(u64 value, int bytes) {
    const int shift = 64 - 8 * bytes;
    return static_cast<u64>(static_cast<i64>(value << shift) >> shift);
}

u64 from_memory(const u8* at, int bytes) {
    u64 value = 0;
    std::memcpy(&value, at, static_cast<size_t>(bytes));
    return value;
}

u64 permuted(u64 a, u64 b, u64 selector) {
    const u64 all = (b << 32) | a;
    u64 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u64 pick = (selector >> (4 * i)) & 15;
        u64 byte = (all >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}

u64 looked_up(u64 a, u64 b, u64 c, u64 table) {
    u64 result = 0;
    for (int i = 0; i < 8; ++i) {
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return result;
}

u64 extracted(u64 value, u64 from, u64 length, int bits, bool sign) {
    if (length == 0) return 0;
    u64 result = 0;
    const u64 top = std::min<u64>(from + length - 1, static_cast<u64>(bits - 1));
    const u64 fill = sign ? value >> top & 1 : 0;
    for (u64 i = 0; i < static_cast<u64>(bits); ++i) {
        const bool inside = i < length && from + i < static_cast<u64>(bits);
        result |= (inside ? value >> (from + i) & 1 : fill) << i;
    }
    return result;
}

u64 inserted(u64 value, u64 into, u64 from, u64 length, int bits) {
    for (u64 i = 0; i < length && from + i < static_cast<u64>(bits); ++i) {
        into = (into & ~(1ull << (from + i))) | (value >> i & 1) << (from + i);
    }
    return into;
}

u64 high_half(u64 a, u64 b, int bytes, bool sign) {
    if (sign) {
        return static_cast<u64>((static_cast<__int128>(static_cast<i64>(a)) * static_cast<i64>(b)) >> (8 * bytes));
    }
    return static_cast<u64>((static_cast<unsigned __int128>(a) * b) >> (8 * bytes));
}

bool compared(u64 a, u64 b, Compare how, bool sign) {
    const bool less = sign ? static_cast<i64>(a) < static_cast<i64>(b) : a < b;
    switch (how) {
        case Compare::eq:
            return a == b;
        case Compare::ne:
            return a != b;
        case Compare::lt:
            return less;
        case Compare::le:
            return less || a == b;
        case Compare::gt:
            return !less && a != b;
        default:
            return !less;
    }
}

}  // namespace

Machine::Machine(AddressSpace& memory, const Kernel& kernel, const Launch& launch, Outcome& outcome)
    : memory_(memory),
      kernel_(kernel),
      launch_(launch),
      outcome_(outcome),
      threads_in_block_(u64{launch.block[0]} * launch.block[1] * launch.block[2]),
      random_(launch.seed) {}

void Machine::run() {
    if (threads_in_block_ == 0 || threads_in_block_ > static_cast<u64>(kernel_.threads_max)) {
        throw Fault(kernel_.name + ": a block of " + std::to_string(threads_in_block_) + " threads, " +
                    std::to_string(kernel_.threads_max) + " are allowed");
    }
    if (kernel_.shared_bytes > kSharedBytesMax) throw Fault(kernel_.name + ": too much shared memory");
    const u64 blocks = u64{launch_.grid[0]} * launch_.grid[1] * launch_.grid[2];
    if (blocks == 0 || launch_.grid[1] > 65535 || launch_.grid[2] > 65535) throw Fault(kernel_.name + ": a bad grid");
    std::vector<u64> order(blocks);
    for (u64 i = 0; i < blocks; ++i) order[i] = i;
    if (launch_.seed) std::shuffle(order.begin(), order.end(), random_);
    for (u64 block : order) run_block(block);
}

// --- scheduling

void Machine::start_threads() {
    threads_.assign(threads_in_block_, {});
    for (u32 i = 0; i < threads_in_block_; ++i) {
        Thread& thread = threads_[i];
        thread.number = i;
        thread.id[0] = i % launch_.block[0];
        thread.id[1] = i / launch_.block[0] % launch_.block[1];
        thread.id[2] = i / launch_.block[0] / launch_.block[1];
        thread.registers.assign(static_cast<size_t>(kernel_.registers), 0xDEADBEEFCAFEF00Dull);
        thread.local.assign(kernel_.local_bytes, 0xCD);
    }
    shared_.assign(kernel_.shared_bytes, 0xA5);
    shared_written_.assign(kernel_.shared_bytes, false);
    shared_shadow_.assign(kernel_.shared_bytes, {});
    barrier_epoch_ = 0;
}

void Machine::run_block(u64 block) {
    block_ = block;
    block_at_[0] = static_cast<u32>(block % launch_.grid[0]);
    block_at_[1] = static_cast<u32>(block / launch_.grid[0] % launch_.grid[1]);
    block_at_[2] = static_cast<u32>(block / launch_.grid[0] / launch_.grid[1]);
    start_threads();
    for (;;) {
        const bool progress = step_all();
        meet_in_warps();
        const auto ended =
            std::count_if(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == State::ended; });
        if (static_cast<size_t>(ended) == threads_.size()) return;
        if (meet_at_barrier()) continue;
        const bool any =
            std::any_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == State::running; });
        if (progress || any) continue;
        for (const Thread& thread : threads_) {
            if (thread.state != State::ended) {
                fail(thread, kernel_.code[static_cast<size_t>(thread.at)], "DEADLOCK: this wait never ends");
            }
        }
    }
}

bool Machine::step_all() {
    std::vector<u32> order(threads_.size());
    for (u32 i = 0; i < order.size(); ++i) order[i] = i;
    if (launch_.seed) std::shuffle(order.begin(), order.end(), random_);
    bool progress = false;
    for (u32 i : order) {
        if (threads_[i].state != State::running) continue;
        step(threads_[i], launch_.seed ? static_cast<long>(1 + random_() % 64) : -1);
        progress = true;
    }
    return progress;
}

void Machine::step(Thread& thread, long turns) {
    const auto end = static_cast<int>(kernel_.code.size());
    while (thread.state == State::running && turns-- != 0) {
        if (thread.at >= end) {
            thread.state = State::ended;
            return;
        }
        const Instruction& one = kernel_.code[static_cast<size_t>(thread.at)];
        if (++outcome_.instructions > kInstructionsMax) fail(thread, one, "a loop without end");
        const bool skipped =
            one.guard >= 0 && ((thread.registers[static_cast<size_t>(one.guard)] & 1) != 0) == one.guard_negated;
        if (skipped || execute(thread, one)) ++thread.at;
    }
}

// True where the thread goes on to the next instruction.
bool Machine::execute(Thread& thread, const Instruction& one) {
    switch (one.op) {
        case Op::mov:
            move(thread, one);
            return true;
        case Op::ld:
            load(thread, one);
            return true;
        case Op::st:
            store(thread, one);
            return true;
        case Op::setp:
            set_predicate(thread, one);
            return true;
        case Op::atom:
        case Op::red:
            atomic(thread, one);
            return true;
        case Op::bra:
            thread.at = one.target;
            return false;
        case Op::ret:
            thread.state = State::ended;
            return false;
        case Op::bar:
            thread.state = State::at_barrier;
            return false;
        case Op::bar_warp:
        case Op::shfl:
        case Op::vote:
            thread.state = State::at_warp;
            return false;
        case Op::fence:
            return true;
        case Op::trap:
            fail(thread, one, "TRAP");
        default:
            arithmetic(thread, one);
            return true;
    }
}

bool Machine::meet_at_barrier() {
    size_t waiting = 0, ended = 0;
    for (const Thread& thread : threads_) {
        waiting += thread.state == State::at_barrier;
        ended += thread.state == State::ended;
    }
    if (waiting == 0 || waiting + ended < threads_.size()) return false;
    const Thread* first = nullptr;
    for (Thread& thread : threads_) {
        if (thread.state != State::at_barrier) continue;
        const Instruction& one = kernel_.code[static_cast<size_t>(thread.at)];
        if (first == nullptr) first = &thread;
        if (thread.at != first->at) find(thread, one, "BARRIER: threads of a block wait at different barriers");
        if (ended > 0) find(thread, one, "BARRIER: some threads of the block have ended before it");
    }
    ++barrier_epoch_;
    for (Thread& thread : threads_) {
        if (thread.state != State::at_barrier) continue;
        thread.state = State::running;
        ++thread.at;
    }
    return true;
}

// --- warps

void Machine::meet_in_warps() {
    for (u32 first = 0; first < threads_.size(); first += 32) {
        for (u32 lane = 0; lane < 32 && first + lane < threads_.size(); ++lane) {
            if (threads_[first + lane].state == State::at_warp && warp_meets(first, lane)) lane = 31;
        }
    }
}

// All lanes that this lane's mask names stand at the same instruction: it happens.
bool Machine::warp_meets(u32 first, u32 lane) {
    const Thread& caller = threads_[first + lane];
    const Instruction& one = kernel_.code[static_cast<size_t>(caller.at)];
    const auto mask = static_cast<u32>(read(caller, one.operands.back()));
    if (!(mask >> lane & 1)) fail(caller, one, "WARP: the caller is not in its own mask");
    for (u32 other = 0; other < 32; ++other) {
        if (!(mask >> other & 1)) continue;
        if (first + other >= threads_.size() || threads_[first + other].state == State::ended) {
            fail(caller, one, "WARP: the mask names lane " + std::to_string(other) + ", which has ended or never was");
        }
        const Thread& thread = threads_[first + other];
        if (thread.state != State::at_warp || thread.at != caller.at) return false;
        if (static_cast<u32>(read(thread, one.operands.back())) != mask) {
            fail(thread, one, "WARP: lanes of one operation name different masks");
        }
    }
    exchange(first, mask, one);
    return true;
}

void Machine::exchange(u32 first, u32 mask, const Instruction& one) {
    u64 result[32] = {};
    bool valid[32] = {};
    u32 ballot = 0;
    if (one.op == Op::vote) {
        for (u32 lane = 0; lane < 32; ++lane) {
            if (mask >> lane & 1) ballot |= static_cast<u32>(read(threads_[first + lane], one.operands[1]) & 1) << lane;
        }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Thread& thread = threads_[first + lane];
        if (one.op == Op::vote) {
            const auto how = static_cast<Vote>(one.variant);
            result[lane] = how == Vote::ballot ? ballot
                           : how == Vote::any  ? ballot != 0
                           : how == Vote::all  ? ballot == mask
                                               : ballot == mask || ballot == 0;
        } else if (one.op == Op::shfl) {
            const auto b = static_cast<u32>(read(thread, one.operands[2])) & 31;
            const auto c = static_cast<u32>(read(thread, one.operands[3]));
            const u32 segment = c >> 8 & 31, clamp = c & 31;
            const u32 lowest = lane & segment, highest = (lane & segment) | (clamp & ~segment);
            int source = 0;
            switch (static_cast<Shuffle>(one.variant)) {
                case Shuffle::up:
                    source = static_cast<int>(lane) - static_cast<int>(b);
                    valid[lane] = source >= static_cast<int>(highest);
                    break;
                case Shuffle::down:
                    source = static_cast<int>(lane + b);
                    valid[lane] = source <= static_cast<int>(highest);
                    break;
                case Shuffle::bfly:
                    source = static_cast<int>(lane ^ b);
                    valid[lane] = source <= static_cast<int>(highest);
                    break;
                case Shuffle::idx:
                    source = static_cast<int>(lowest | (b & ~segment));
                    valid[lane] = source <= static_cast<int>(highest);
                    break;
            }
            if (!valid[lane]) source = static_cast<int>(lane);
            if (!(mask >> source & 1)) {
                find(thread, one, "WARP: a shuffle reads a lane outside of its mask");
                source = static_cast<int>(lane);
            }
            result[lane] = read(threads_[first + static_cast<u32>(source)], one.operands[1]);
        }
    }
    for (u32 lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        Thread& thread = threads_[first + lane];
        if (one.op == Op::bar_warp) {
            ++thread.warp_epoch;
        } else {
            write(thread, one.operands[0], cut(result[lane], 4));
            if (!one.operands[0].parts.empty()) write(thread, one.operands[0].parts[0], valid[lane]);
        }
        thread.state = State::running;
        ++thread.at;
    }
}

// --- operands

u64 Machine::special(const Thread& thread, Special which) const {
    const auto number = static_cast<int>(which);
    if (number <= 2) return thread.id[number];
    if (number <= 5) return launch_.block[number - 3];
    if (number <= 8) return block_at_[number - 6];
    if (number <= 11) return launch_.grid[number - 9];
    return which == Special::laneid ? thread.number % 32 : thread.number / 32;
}

u64 Machine::read(const Thread& thread, const Operand& operand) const {
    switch (operand.is) {
        case Operand::Is::reg: {
            const u64 value = thread.registers[static_cast<size_t>(operand.reg)];
            return operand.negated ? !(value & 1) : value;
        }
        case Operand::Is::constant:
            return static_cast<u64>(operand.value);
        case Operand::Is::special:
            return special(thread, static_cast<Special>(operand.value));
        default:
            return 0;
    }
}

u64 Machine::read(const Thread& thread, const Operand& operand, Type type) const {
    const u64 value = read(thread, operand);
    if (type == Type::pred) return value & 1;
    return is_signed(type) ? extended(value, size_of(type)) : cut(value, size_of(type));
}

void Machine::write(Thread& thread, const Operand& operand, u64 value) {
    if (operand.is == Operand::Is::reg) thread.registers[static_cast<size_t>(operand.reg)] = value;
}

// --- what computes

void Machine::move(Thread& thread, const Instruction& one) {
    const Operand &to = one.operands[0], &from = one.operands[1];
    const int bytes = size_of(one.type);
    if (to.is == Operand::Is::vector) {
        const int part = bytes / static_cast<int>(to.parts.size());
        for (size_t i = 0; i < to.parts.size(); ++i) {
            write(thread, to.parts[i], cut(read(thread, from) >> (8 * part * static_cast<int>(i)), part));
        }
    } else if (from.is == Operand::Is::vector) {
        const int part = bytes / static_cast<int>(from.parts.size());
        u64 value = 0;
        for (size_t i = 0; i < from.parts.size(); ++i) {
            value |= cut(read(thread, from.parts[i]), part) << (8 * part * static_cast<int>(i));
        }
        write(thread, to, value);
    } else {
        write(thread, to, one.type == Type::pred ? read(thread, from) & 1 : cut(read(thread, from), bytes));
    }
}

void Machine::set_predicate(Thread& thread, const Instruction& one) {
    const auto how = static_cast<Compare>(one.variant);
    bool value = compared(read(thread, one.operands[1], one.type), read(thread, one.operands[2], one.type), how,
                          is_signed(one.type));
    bool opposite = !value;
    if (one.join != Join::none) {
        const bool third = read(thread, one.operands[3]) & 1;
        auto joined = [&](bool with) {
            return one.join == Join::and_ ? with && third : one.join == Join::or_ ? with || third : with != third;
        };
        value = joined(value);
        opposite = joined(opposite);
    }
    write(thread, one.operands[0], value);
    if (!one.operands[0].parts.empty()) write(thread, one.operands[0].parts[0], opposite);
}

void Machine::arithmetic(Thread& thread, const Instruction& one) {
    const Type type = one.type;
    const int bytes = size_of(type), bits = 8 * bytes;
    const bool sign = is_signed(type);
    const auto& o = one.operands;
    const u64 a = o.size() > 1 ? read(thread, o[1], type) : 0;
    const u64 b = o.size() > 2 ? read(thread, o[2], type) : 0;
    const u64 c = o.size() > 3 ? read(thread, o[3]) : 0;
    u64 value = 0;
    int width = bytes;
    switch (one.op) {
        case Op::add:
            value = a + b;
            break;
        case Op::sub:
            value = a - b;
            break;
        case Op::mul:
            value = a * b;
            break;
        case Op::mad:
            value = a * b + c;
            break;
        case Op::mul_wide:
        case Op::mad_wide:
            value = a * b + (one.op == Op::mad_wide ? c : 0);
            width = 2 * bytes;
            break;
        case Op::mul_hi:
        case Op::mad_hi:
            value = high_half(a, b, bytes, sign) + (one.op == Op::mad_hi ? c : 0);
            break;
        case Op::div:
        case Op::rem:
            if (b == 0) {
                find(thread, one, "DIVISION by zero");
                value = ~0ull;
            } else if (sign && static_cast<i64>(b) == -1) {
                value = one.op == Op::div ? 0 - a : 0;
            } else if (sign) {
                const auto x = static_cast<i64>(a), y = static_cast<i64>(b);
                value = static_cast<u64>(one.op == Op::div ? x / y : x % y);
            } else {
                value = one.op == Op::div ? a / b : a % b;
            }
            break;
        case Op::neg:
            value = 0 - a;
            break;
        case Op::abs:
            value = static_cast<i64>(a) < 0 ? 0 - a : a;
            break;
        case Op::min:
        case Op::max: {
            const bool less = sign ? static_cast<i64>(a) < static_cast<i64>(b) : a < b;
            value = less == (one.op == Op::min) ? a : b;
            break;
        }
        case Op::and_:
            value = a & b;
            break;
        case Op::or_:
            value = a | b;
            break;
        case Op::xor_:
            value = a ^ b;
            break;
        case Op::not_:
            value = type == Type::pred ? !a : ~a;
            break;
        case Op::cnot:
            value = a == 0;
            break;
        case Op::shl: {
            const u64 by = cut(read(thread, o[2]), 4);
            value = by >= static_cast<u64>(bits) ? 0 : a << by;
            break;
        }
        case Op::shr: {
            const u64 by = cut(read(thread, o[2]), 4);
            value = sign                           ? static_cast<u64>(static_cast<i64>(a) >> std::min<u64>(by, 63))
                    : by >= static_cast<u64>(bits) ? 0
                                                   : a >> by;
            break;
        }
        case Op::shf_l:
        case Op::shf_r: {
            const u64 both = (cut(b, 4) << 32) | cut(a, 4);
            const u64 by = one.clamped ? std::min<u64>(cut(c, 4), 32) : c & 31;
            value = one.op == Op::shf_l ? (both << by) >> 32 : both >> by;
            break;
        }
        case Op::prmt:
            value = permuted(cut(a, 4), cut(b, 4), c);
            break;
        case Op::lop3:
            value = looked_up(a, b, c, read(thread, o[4]));
            break;
        case Op::bfe:
            value = extracted(cut(a, bytes), read(thread, o[2]) & 255, c & 255, bits, sign);
            break;
        case Op::bfi:
            value = inserted(a, b, c & 255, read(thread, o[4]) & 255, bits);
            break;
        case Op::popc:
            value = static_cast<u64>(__builtin_popcountll(a));
            width = 4;
            break;
        case Op::clz:
            value = a == 0 ? static_cast<u64>(bits) : static_cast<u64>(__builtin_clzll(a) - (64 - bits));
            width = 4;
            break;
        case Op::brev:
            for (int i = 0; i < bits; ++i) value |= (a >> i & 1) << (bits - 1 - i);
            break;
        case Op::bfind: {
            const u64 plain = cut(sign && static_cast<i64>(a) < 0 ? ~a : a, bytes);
            value = plain == 0 ? ~0ull : static_cast<u64>(63 - __builtin_clzll(plain));
            width = 4;
            break;
        }
        case Op::selp:
            value = read(thread, o[3]) & 1 ? a : b;
            break;
        case Op::cvt:
            value = read(thread, o[1], one.from);
            if (sign) value = extended(value, bytes);
            break;
        case Op::cvta: {
            const u64 base = one.space == Space::shared ? kSharedBase : one.space == Space::local ? kLocalBase : 0;
            value = one.to ? a - base : a + base;
            break;
        }
        default:
            fail(thread, one, std::string("the simulator does not know ") + name_of(one.op));
    }
    write(thread, o[0], type == Type::pred ? value & 1 : cut(value, width));
}

// --- memory

void Machine::load(Thread& thread, const Instruction& one) {
    const Operand &to = one.operands[0], &from = one.operands[1];
    const int bytes = size_of(one.type);
    const u64 at = (from.reg >= 0 ? thread.registers[static_cast<size_t>(from.reg)] : 0) + static_cast<u64>(from.value);
    const u64 total = static_cast<u64>(bytes) * one.width;
    const u8* memory;
    if (one.space == Space::param) {
        if (at + total > launch_.parameters.size()) fail(thread, one, "BOUNDS: behind the kernel's parameters");
        memory = launch_.parameters.data() + at;
    } else {
        memory = resolve(thread, one, at, total, false, false);
    }
    for (int i = 0; i < one.width; ++i) {
        u64 value = from_memory(memory + i * bytes, bytes);
        if (is_signed(one.type)) value = extended(value, bytes);
        write(thread, one.width > 1 ? to.parts[static_cast<size_t>(i)] : to, value);
    }
}

void Machine::store(Thread& thread, const Instruction& one) {
    const Operand &to = one.operands[0], &from = one.operands[1];
    const int bytes = size_of(one.type);
    const u64 at = (to.reg >= 0 ? thread.registers[static_cast<size_t>(to.reg)] : 0) + static_cast<u64>(to.value);
    u8* memory = resolve(thread, one, at, static_cast<u64>(bytes) * one.width, true, false);
    for (int i = 0; i < one.width; ++i) {
        const u64 value = read(thread, one.width > 1 ? from.parts[static_cast<size_t>(i)] : from);
        std::memcpy(memory + i * bytes, &value, static_cast<size_t>(bytes));
    }
}

void Machine::atomic(Thread& thread, const Instruction& one) {
    const size_t first = one.op == Op::atom ? 1 : 0;
    const Operand& to = one.operands[first];
    const int bytes = size_of(one.type);
    const u64 at = (to.reg >= 0 ? thread.registers[static_cast<size_t>(to.reg)] : 0) + static_cast<u64>(to.value);
    u8* memory = resolve(thread, one, at, static_cast<u64>(bytes), true, true);
    u64 before = from_memory(memory, bytes);
    if (is_signed(one.type)) before = extended(before, bytes);
    const u64 value = read(thread, one.operands[first + 1], one.type);
    const bool less = is_signed(one.type) ? static_cast<i64>(value) < static_cast<i64>(before) : value < before;
    u64 after = before;
    switch (static_cast<Atomic>(one.variant)) {
        case Atomic::add:
            after = before + value;
            break;
        case Atomic::and_:
            after = before & value;
            break;
        case Atomic::or_:
            after = before | value;
            break;
        case Atomic::xor_:
            after = before ^ value;
            break;
        case Atomic::min:
            after = less ? value : before;
            break;
        case Atomic::max:
            after = less ? before : value;
            break;
        case Atomic::exch:
            after = value;
            break;
        case Atomic::cas:
            after = before == value ? read(thread, one.operands[first + 2], one.type) : before;
            break;
    }
    std::memcpy(memory, &after, static_cast<size_t>(bytes));
    if (one.op == Op::atom) write(thread, one.operands[0], cut(before, bytes));
}

u8* Machine::resolve(Thread& thread, const Instruction& one, u64 at, u64 bytes, bool write, bool is_atomic) {
    if (one.space == Space::shared) at += kSharedBase;
    if (one.space == Space::local) at += kLocalBase;
    const std::string what = std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes";
    if (at % bytes != 0) fail(thread, one, "ALIGNMENT: " + what + " at " + std::to_string(at));
    if (at >= kLocalBase) {
        const u64 offset = at - kLocalBase;
        if (offset + bytes > thread.local.size()) fail(thread, one, "BOUNDS: local " + what);
        return thread.local.data() + offset;
    }
    if (at >= kSharedBase) {
        const u64 offset = at - kSharedBase - kSharedStart;
        if (offset + bytes > shared_.size() || offset > shared_.size()) {
            fail(thread, one, "BOUNDS: shared " + what + " at offset " + std::to_string(static_cast<i64>(offset)));
        }
        for (u64 i = offset; i < offset + bytes; ++i) {
            if (!shared_written_[i] && (!write || is_atomic)) {
                find(thread, one, "UNINITIALISED shared memory is read");
                break;
            }
            if (write) shared_written_[i] = true;
        }
        for (u64 i = 0; i < bytes; ++i) check_race(thread, one, shared_shadow_[offset + i], at + i, write, is_atomic);
        return shared_.data() + offset;
    }
    if (last_ == nullptr || !last_->holds(at, bytes)) last_ = memory_.find(at);
    if (last_ == nullptr) fail(thread, one, "BOUNDS: " + what + " where there is no memory");
    if (!last_->holds(at, bytes)) fail(thread, one, "BOUNDS: " + what + " beyond an allocation");
    if (last_->kind == Kind::device && last_->device != launch_.device) {
        fail(thread, one, "BOUNDS: " + what + " of another device's memory");
    }
    if (last_->kind == Kind::freed) fail(thread, one, "FREED memory: " + what);
    const u64 offset = at - last_->base;
    outcome_.accesses.insert({at / kPage, write});
    if (!last_->written.empty()) {
        for (u64 i = offset; i < offset + bytes; ++i) {
            if (!last_->written[i] && (!write || is_atomic)) {
                find(thread, one, "UNINITIALISED memory is read");
                break;
            }
            if (write) last_->written[i] = true;
        }
    }
    for (u64 i = at; i < at + bytes; ++i) {
        auto& page = global_shadow_[i / kPage];
        if (page == nullptr) page = std::make_unique<Shadow[]>(kPage);
        check_race(thread, one, page[i % kPage], i, write, is_atomic);
    }
    return last_->host + offset;
}

bool Machine::ordered(const Touch& before, u64 thread, const Thread& now) const {
    if (before.thread == 0 || before.thread == thread) return true;
    if ((before.thread - 1) / threads_in_block_ != block_) return false;
    if (before.barrier_epoch != barrier_epoch_) return true;
    const u64 other = (before.thread - 1) % threads_in_block_;
    return other / 32 == now.number / 32 && before.warp_epoch != now.warp_epoch;
}

void Machine::check_race(Thread& thread, const Instruction& one, Shadow& shadow, u64 at, bool write, bool is_atomic) {
    if (one.volatile_ && !is_atomic) return;
    const u64 me = global_number(thread);
    auto clashes = [&](const Touch& before) { return !ordered(before, me, thread) && !(is_atomic && before.atomic); };
    auto report = [&](const char* how, const Touch& before) {
        find(thread, one,
             std::string("RACE ") + how + (at >= kSharedBase ? " in shared" : " in global") + " memory with thread " +
                 std::to_string((before.thread - 1) % threads_in_block_) + " of block " +
                 std::to_string((before.thread - 1) / threads_in_block_));
    };
    const Touch now{me, barrier_epoch_, thread.warp_epoch, is_atomic};
    if (clashes(shadow.write)) report(write ? "write-write" : "write-read", shadow.write);
    if (write) {
        if (clashes(shadow.read))
            report("read-write", shadow.read);
        else if (clashes(shadow.other_read))
            report("read-write", shadow.other_read);
        shadow.write = now;
    } else {
        if (shadow.read.thread != me) shadow.other_read = shadow.read;
        shadow.read = now;
    }
}

// --- what was found

std::string Machine::where(const Thread& thread, const Instruction& one) const {
    return " (" + kernel_.name + ", block " + std::to_string(block_) + ", thread " + std::to_string(thread.number) +
           ", PTX line " + std::to_string(one.line) + ")";
}

void Machine::find(const Thread& thread, const Instruction& one, const std::string& what) {
    const std::string key = what.substr(0, what.find(' ')) + std::to_string(one.line);
    if (outcome_.findings.size() < kFindingsMax && found_.insert(key).second) {
        outcome_.findings.push_back(what + where(thread, one));
    }
}

void Machine::fail(const Thread& thread, const Instruction& one, const std::string& what) {
    find(thread, one, what);
    throw Fault(what + where(thread, one));
}

}  // namespace sim
