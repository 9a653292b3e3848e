// PTX as nvcc writes it, read into instructions. What is not known here is refused: the simulator never guesses.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "memory.hpp"

namespace sim {

enum class Type : u8 { none, u8_, u16_, u32_, u64_, s8_, s16_, s32_, s64_, pred };

int size_of(Type type);
bool is_signed(Type type);

enum class Op : u8 {
    mov,
    ld,
    st,
    add,
    sub,
    mul,
    mul_hi,
    mul_wide,
    mad,
    mad_hi,
    mad_wide,
    div,
    rem,
    neg,
    abs,
    min,
    max,
    and_,
    or_,
    xor_,
    not_,
    cnot,
    shl,
    shr,
    shf_l,
    shf_r,
    prmt,
    bfe,
    bfi,
    popc,
    clz,
    brev,
    bfind,
    lop3,
    setp,
    selp,
    cvt,
    cvta,
    bra,
    ret,
    bar,
    bar_warp,
    shfl,
    vote,
    atom,
    red,
    fence,
    trap
};

enum class Space : u8 { generic, global, shared, local, param };
enum class Compare : u8 { eq, ne, lt, le, gt, ge };
enum class Join : u8 { none, and_, or_, xor_ };  // of a setp with a third predicate
enum class Shuffle : u8 { up, down, bfly, idx };
enum class Vote : u8 { ballot, any, all, uni };
enum class Atomic : u8 { add, and_, or_, xor_, min, max, exch, cas };
enum class Special : u8 {
    tid_x,
    tid_y,
    tid_z,
    ntid_x,
    ntid_y,
    ntid_z,
    ctaid_x,
    ctaid_y,
    ctaid_z,
    nctaid_x,
    nctaid_y,
    nctaid_z,
    laneid,
    warpid
};

struct Operand {
    enum class Is : u8 { nothing, reg, constant, special, vector, address };
    Is is = Is::nothing;
    int reg = -1;                // of a register; the base of an address, -1 for none
    i64 value = 0;               // of a constant; the offset of an address; the number of a special register
    bool negated = false;        // a predicate behind '!'
    std::vector<Operand> parts;  // of a vector; the second half of a pair d|p
    std::string symbol;          // resolved into `value` once the kernel is known
};

struct Instruction {
    Op op;
    Type type = Type::none, from = Type::none;
    Space space = Space::generic;
    u8 width = 1;    // elements of a vector access
    u8 variant = 0;  // Compare, Shuffle, Vote or Atomic
    Join join = Join::none;
    bool clamped = false;    // shf.clamp, not shf.wrap
    bool volatile_ = false;  // an access that claims to be ordered
    bool to = false;         // cvta.to
    int guard = -1;          // predicate register
    bool guard_negated = false;
    std::vector<Operand> operands;
    int target = -1;  // of a branch
    int line = 0;     // in the PTX
};

struct Symbol {
    Space space;
    u64 offset, bytes;
};

struct Kernel {
    std::string name;
    std::vector<Symbol> parameters;
    u64 parameter_bytes = 0, shared_bytes = 0, local_bytes = 0;
    int registers = 0;
    int threads_max = 1024;
    std::vector<Instruction> code;
    std::map<std::string, Symbol> symbols;
};

constexpr u64 kSharedBase = 1ull << 50, kLocalBase = 1ull << 51;
constexpr u64 kSharedStart = 1024;  // so that a null pointer is none

// One PTX file. A kernel is read when it is first asked for.
class Module {
  public:
    explicit Module(std::string text);

    std::vector<std::string> kernels() const;
    // Fault for an unknown kernel, or one with something unknown in it.
    const Kernel& kernel(const std::string& name);

  private:
    std::string text_;
    std::map<std::string, size_t> begins_;  // of each kernel's name in the text
    std::map<std::string, Kernel> read_;
};

const char* name_of(Op op);

}  // namespace sim
