#include <array>
#include <deque>

#include "bindings.hpp"
#include "pull.hpp"

namespace snapshotd {

namespace {

constexpr double kTimeoutMaxS = 366.0 * 24 * 3600;

void refuse_overlap(const Bytes& one, const Bytes& other) {
    if (overlap(one, other)) throw std::invalid_argument("dst, staging, sources and crcs must not overlap");
}

// The sources of one call, and the buffers that it holds for them.
class Sources {
  public:
    Sources(const py::sequence& given, uint64_t dst_bytes, Layout layout) {
        if (given.size() > kSymbolsMax) {
            throw std::invalid_argument("there can be 255 sources at most, not " + std::to_string(given.size()));
        }
        for (py::handle one : given) add(py::cast<py::tuple>(one), dst_bytes, layout);
    }

    const Source* data() const { return sources_.data(); }
    size_t count() const { return count_; }
    const std::deque<Bytes>& held() const { return held_; }

  private:
    void add(const py::tuple& given, uint64_t dst_bytes, Layout layout) {
        if (given.size() != 5) {
            throw std::invalid_argument("a source is (socket or bytes, coefficient, length, crcs, block_bytes)");
        }
        const uint64_t factor = to_unsigned(given[1], "coefficient"), length = to_unsigned(given[2], "length");
        if (factor > 255) throw std::invalid_argument("coefficient must be at most 255, not " + std::to_string(factor));
        if (length > dst_bytes) {
            throw std::invalid_argument("dst has " + std::to_string(dst_bytes) + " bytes, fewer than the length of " +
                                        std::to_string(length));
        }
        const BlockCrcs crcs = to_crcs(held_.emplace_back(given[3]), given[4], length);
        if (layout == Layout::planes && crcs.block_bytes % kSuperblockBytes != 0) {
            throw std::invalid_argument("in planes, block_bytes must be a multiple of " +
                                        std::to_string(kSuperblockBytes) + ", not " + std::to_string(crcs.block_bytes));
        }
        Source& source = sources_[count_++];
        source = {-1, nullptr, static_cast<byte>(factor), length, crcs};
        if (PyLong_Check(given[0].ptr())) {
            source.socket = py::cast<int>(given[0]);
            return;
        }
        const Bytes& there = held_.emplace_back(given[0]);
        if (there.size() != length) {
            throw std::invalid_argument("a source of " + std::to_string(length) + " bytes has " +
                                        std::to_string(there.size()));
        }
        source.there = there.data();
    }

    std::array<Source, kSymbolsMax> sources_;
    size_t count_ = 0;
    std::deque<Bytes> held_;
};

py::object gather(py::handle dst, const py::sequence& given, py::handle staging, const std::string& layout_name,
                  double timeout_s) {
    const Layout layout = to_layout(layout_name);
    Bytes to(dst, true), by(staging, true);
    const Sources sources(given, to.size(), layout);
    const uint64_t least = layout == Layout::planes ? kSuperblockBytes : 1;
    if (by.size() / std::max<size_t>(sources.count(), 1) < least) {
        throw std::invalid_argument("staging has " + std::to_string(by.size()) + " bytes, and " +
                                    std::to_string(sources.count()) + " sources need " + std::to_string(least) +
                                    " each");
    }
    refuse_overlap(to, by);
    for (const Bytes& held : sources.held()) {
        refuse_overlap(to, held);
        refuse_overlap(by, held);
    }
    if (!(timeout_s >= 0 && timeout_s <= kTimeoutMaxS)) {
        throw std::invalid_argument("timeout_s must lie between 0 and a year, not " + std::to_string(timeout_s));
    }
    Pulled pulled;
    {
        NoGil release;
        const Sum sum{to.data(), to.size(), layout, by.data(), by.size()};
        pulled = pull(*erasure_tiers().front(), sources.data(), sources.count(), sum, Patience(timeout_s));
    }
    if (pulled.source < 0) return py::none();
    return py::make_tuple(pulled.source, pulled.bad_block, pulled.error);
}

}  // namespace

void bind_pull(py::module_& m) {
    m.def("ec_gather", gather, "dst"_a, "sources"_a, "staging"_a, py::kw_only(), "layout"_a, "timeout_s"_a);
}

}  // namespace snapshotd
