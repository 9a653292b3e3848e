// The erasure code for callers that have addresses instead of Python objects, and no Python between two calls:
// `_native.ec_entry_points()` gives the addresses of these functions. They check nothing.
#pragma once

#include "erasure.hpp"

namespace snapshotd {

using EncodeEntry = void (*)(unsigned k, unsigned m, const byte* const* data, byte* const* parity, size_t bytes,
                             int threads);

// `rows` are m rows of k coefficients in the layout of the code: `recovery`.
using DecodeEntry = void (*)(unsigned k, unsigned m, unsigned outputs, const byte* rows, const byte* const* have,
                             byte* const* want, size_t bytes, int threads);

// One symbol into one output, in planes: checked by `crcs` where that is not null, and `made` where that is not.
using AccumulateEntry = int64_t (*)(byte* to, const byte* from, size_t bytes, byte factor, int first, const byte* crcs,
                                    byte* made, size_t block_bytes);

// `stores`: 0 temporal, 1 non-temporal. `data_words` and `parity_words` may be null.
using EncodeCopyingEntry = void (*)(unsigned k, unsigned m, const byte* const* data, byte* const* parity,
                                    byte* const* copies, byte* const* data_words, byte* const* parity_words,
                                    size_t bytes, size_t block_bytes, int stores, int threads);

struct EntryPoints {
    EncodeEntry encode;
    DecodeEntry decode;
    AccumulateEntry accumulate;
    EncodeCopyingEntry encode_copying;
};

EntryPoints entry_points();

}  // namespace snapshotd
