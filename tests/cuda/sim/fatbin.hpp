// Takes the PTX texts out of the fat binary that nvcc put into a program. The container is not documented; what is read
// here was learnt by looking, and what looks different is refused.
#pragma once

#include <dlfcn.h>

#include <cstring>

#include "memory.hpp"

namespace sim {

inline std::string unpack_lz4(const u8* from, u64 bytes, u64 unpacked_bytes) {
    std::string out;
    u64 at = 0;
    auto length = [&](u64 nibble) {
        if (nibble == 15) {
            u8 more;
            do nibble += more = from[at++];
            while (more == 255);
        }
        return nibble;
    };
    while (at < bytes && out.size() < unpacked_bytes) {
        const u8 token = from[at++];
        const u64 literals = length(token >> 4);
        out.append(reinterpret_cast<const char*>(from) + at, literals);
        at += literals;
        if (at >= bytes || out.size() >= unpacked_bytes) break;
        const u64 back = from[at] | from[at + 1] << 8;
        at += 2;
        const u64 matched = length(token & 15) + 4, start = out.size() - back;
        for (u64 i = 0; i < matched; ++i) out.push_back(out[start + i]);
    }
    return out;
}

inline std::string unpack_zstd(const u8* from, u64 bytes, u64 unpacked_bytes) {
    void* library = dlopen("libzstd.so.1", RTLD_NOW);
    auto unpack = reinterpret_cast<size_t (*)(void*, size_t, const void*, size_t)>(
        library == nullptr ? nullptr : dlsym(library, "ZSTD_decompress"));
    if (unpack == nullptr) throw Fault("PTX is packed with zstd, and libzstd.so.1 is not there");
    std::string out(unpacked_bytes, 0);
    if (unpack(out.data(), out.size(), from, bytes) != unpacked_bytes) throw Fault("zstd did not unpack the PTX");
    return out;
}

// By compute capability, 80 for sm_80.
inline std::map<int, std::string> ptx_in(const u8* binary) {
    auto number = [](const u8* at, int bytes) {
        u64 value = 0;
        std::memcpy(&value, at, static_cast<size_t>(bytes));
        return value;
    };
    if (number(binary, 4) != 0xBA55ED50) throw Fault("this is no fat binary");
    std::map<int, std::string> found;
    const u64 head = number(binary + 6, 2), end = head + number(binary + 8, 8);
    for (u64 at = head; at < end;) {
        const u8* entry = binary + at;
        const u64 entry_head = number(entry + 4, 4), bytes = number(entry + 8, 8);
        constexpr u64 is_ptx = 1, by_lz4 = 0x2000, by_zstd = 0x8000;
        if (number(entry, 2) == is_ptx) {
            const u64 packed = number(entry + 16, 4), flags = number(entry + 40, 8), unpacked = number(entry + 56, 8);
            const u8* text = entry + entry_head;
            found[static_cast<int>(number(entry + 28, 4))] =
                flags & by_zstd  ? unpack_zstd(text, packed, unpacked)
                : flags & by_lz4 ? unpack_lz4(text, packed, unpacked)
                                 : std::string(reinterpret_cast<const char*>(text), bytes);
        }
        at += entry_head + bytes;
    }
    return found;
}

}  // namespace sim
