#include "entry.hpp"

namespace snapshotd {

namespace {

const ErasureTier& in_use() {
    return *erasure_tiers().front();
}

std::vector<byte*> listed(byte* const* pointers, unsigned count) {
    return pointers == nullptr ? std::vector<byte*>{} : std::vector<byte*>(pointers, pointers + count);
}

void encode_entry(unsigned k, unsigned m, const byte* const* data, byte* const* parity, size_t bytes, int threads) {
    encode(in_use(), {k, m}, {data, k, parity, m, bytes}, threads);
}

void decode_entry(unsigned k, unsigned m, unsigned outputs, const byte* rows, const byte* const* have,
                  byte* const* want, size_t bytes, int threads) {
    combine(in_use(), Code(k, m).layout, rows, {have, k, want, outputs, bytes}, threads);
}

int64_t accumulate_entry(byte* to, const byte* from, size_t bytes, byte factor, int first, const byte* crcs, byte* made,
                         size_t block_bytes) {
    const MadeCrcs room{made, block_bytes};
    return accumulate(in_use(), Layout::planes, {from, bytes, &factor, &to, bytes, 1, first != 0}, {crcs, block_bytes},
                      made == nullptr ? nullptr : &room);
}

void encode_copying_entry(unsigned k, unsigned m, const byte* const* data, byte* const* parity, byte* const* copies,
                          byte* const* data_words, byte* const* parity_words, size_t bytes, size_t block_bytes,
                          int stores, int threads) {
    encode_copying(in_use(), {k, m}, {data, k, parity, m, bytes},
                   {listed(copies, k), listed(data_words, k), listed(parity_words, m), block_bytes,
                    stores == 0 ? Stores::temporal : Stores::non_temporal},
                   threads);
}

}  // namespace

EntryPoints entry_points() {
    return {encode_entry, decode_entry, accumulate_entry, encode_copying_entry};
}

}  // namespace snapshotd
