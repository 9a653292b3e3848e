#include <cstring>

#include "arena.hpp"
#include "bindings.hpp"
#include "reserve.hpp"

namespace snapshotd {

namespace {

// --- identifiers: bytes in Python, words here

template <typename Id>
Id to_id(const std::string& bytes, const char* what) {
    Id id;
    if (bytes.size() != sizeof id) {
        throw std::invalid_argument(std::string(what) + " must have " + std::to_string(sizeof id) + " bytes, not " +
                                    std::to_string(bytes.size()));
    }
    std::memcpy(id.data(), bytes.data(), sizeof id);
    return id;
}

template <typename Id>
py::bytes from_id(const Id& id) {
    return {reinterpret_cast<const char*>(id.data()), sizeof id};
}

uint32_t wait_change(const Arena& arena, uint32_t seen, double timeout_s) {
    std::shared_ptr<Mapping> map = arena.mapped();
    Word32& changes = Arena::header_of(*map).changes;
    wait_for(timeout_s, [&](Clock::time_point deadline) {
        Woken woken = Woken::changed;
        while (changes.load(std::memory_order_acquire) == seen && woken == Woken::changed) {
            woken = futex_wait(changes, seen, deadline, Sharing::between_processes);
        }
        return woken;
    });
    return changes.load(std::memory_order_acquire);
}

// What a memoryview of a slot stands on: counts itself in the mapping and keeps it.
class SlotExporter {
  public:
    SlotExporter(std::shared_ptr<Mapping> map, byte* data, uint64_t bytes)
        : map_(std::move(map)), data_(data), bytes_(bytes) {
        map_->views.fetch_add(1);
    }
    ~SlotExporter() { map_->views.fetch_sub(1); }
    SlotExporter(const SlotExporter&) = delete;
    SlotExporter& operator=(const SlotExporter&) = delete;

    py::buffer_info info() const {
        auto length = static_cast<py::ssize_t>(bytes_);
        return {data_, 1, py::format_descriptor<byte>::format(), 1, {length}, {py::ssize_t{1}}, !map_->writable};
    }

  private:
    std::shared_ptr<Mapping> map_;
    byte* data_;
    uint64_t bytes_;
};

py::object slot_view(const Arena& arena, uint32_t index) {
    std::shared_ptr<Mapping> map = arena.mapped();
    byte* data = arena.slot_bytes_at(*map, index);
    py::object exporter = py::cast(std::make_unique<SlotExporter>(std::move(map), data, arena.geometry().slot_bytes));
    PyObject* view = PyMemoryView_FromObject(exporter.ptr());
    if (view == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(view);
}

py::bytes to_words(const std::vector<uint32_t>& crcs, uint64_t first, uint64_t count) {
    return {reinterpret_cast<const char*>(crcs.data() + first), count * sizeof(uint32_t)};
}

py::bytes crc_words(const Arena& arena, uint32_t index, py::handle first_given, py::handle count_given) {
    std::vector<uint32_t> crcs = arena.block_crcs(index);
    uint64_t first = to_unsigned(first_given, "first");
    if (first > crcs.size())
        throw std::invalid_argument("the file has only " + std::to_string(crcs.size()) + " blocks");
    uint64_t count = count_given.is_none() ? crcs.size() - first : to_unsigned(count_given, "count");
    if (count > crcs.size() - first) {
        throw std::invalid_argument("the file has only " + std::to_string(crcs.size()) + " blocks");
    }
    return to_words(crcs, first, count);
}

void put_block_crcs(const Arena& arena, uint32_t index, uint64_t file_bytes, py::handle words_given) {
    Bytes words(words_given);
    if (words.size() % sizeof(uint32_t) != 0) throw std::invalid_argument("words must have 4 bytes for each block");
    std::vector<uint32_t> crcs(words.size() / sizeof(uint32_t));
    std::memcpy(crcs.data(), words.data(), words.size());
    arena.put_block_crcs(*arena.mapped_for_writing(), index, file_bytes, crcs);
}

// A property over one of the header's words.
template <Word64 Header::* word>
uint64_t read_word(const Arena& arena) {
    return (Arena::header_of(*arena.mapped()).*word).load(std::memory_order_acquire);
}

template <Word64 Header::* word>
void write_word(const Arena& arena, py::handle value) {
    uint64_t number = to_unsigned(value, "the value");
    (Arena::header_of(*arena.mapped_for_writing()).*word).store(number, std::memory_order_release);
}

void set_owner(Arena& arena, uint64_t generation, const std::string& nonce, py::handle rank, py::handle world_size,
               py::handle local_world, py::handle every, py::handle pid, bool fenced, bool closed,
               uint64_t released_at_s, uint64_t restored_generation, const std::string& restored_nonce,
               uint64_t restored_step) {
    Owner owner;
    owner.generation = generation;
    owner.nonce = to_id<Id16>(nonce, "nonce");
    owner.rank = to_u32(rank, "rank");
    owner.world_size = to_u32(world_size, "world_size");
    owner.local_world = to_u32(local_world, "local_world");
    owner.every = to_u32(every, "every");
    owner.pid = to_u32(pid, "pid");
    owner.fenced = fenced;
    owner.closed = closed;
    owner.released_at_s = released_at_s;
    owner.restored_generation = restored_generation;
    owner.restored_nonce = to_id<Id16>(restored_nonce, "restored_nonce");
    owner.restored_step = restored_step;
    arena.set_owner(owner);
}

int claim(Arena& arena, uint64_t generation, const std::string& nonce, uint64_t step, py::handle rank,
          py::handle world_size, const std::string& fingerprint) {
    Identity identity;
    identity.generation = generation;
    identity.nonce = to_id<Id16>(nonce, "nonce");
    identity.step = step;
    identity.rank = to_u32(rank, "rank");
    identity.world_size = to_u32(world_size, "world_size");
    identity.fingerprint = to_id<Id32>(fingerprint, "fingerprint");
    return arena.claim(identity);
}

std::string describe(const SlotInfo& info) {
    return "SlotInfo(index=" + std::to_string(info.index) + ", state=" + std::to_string(info.state) +
           ", generation=" + std::to_string(info.identity.generation) + ", step=" + std::to_string(info.identity.step) +
           ", rank=" + std::to_string(info.identity.rank) + "/" + std::to_string(info.identity.world_size) +
           ", file_bytes=" + std::to_string(info.file_bytes) + ", sound=" + (info.sound ? "True" : "False") + ")";
}

std::string describe(const Owner& owner) {
    return "Owner(generation=" + std::to_string(owner.generation) + ", rank=" + std::to_string(owner.rank) + "/" +
           std::to_string(owner.world_size) + ", pid=" + std::to_string(owner.pid) + (owner.fenced ? ", fenced" : "") +
           (owner.closed ? ", closed" : "") + ")";
}

}  // namespace

void bind_arena(py::module_& m) {
    py::class_<SlotInfo>(m, "SlotInfo", py::is_final())
        .def_readonly("index", &SlotInfo::index)
        .def_readonly("state", &SlotInfo::state)
        .def_readonly("file_bytes", &SlotInfo::file_bytes)
        .def_readonly("sound", &SlotInfo::sound)
        .def_property_readonly("generation", [](const SlotInfo& s) { return s.identity.generation; })
        .def_property_readonly("nonce", [](const SlotInfo& s) { return from_id(s.identity.nonce); })
        .def_property_readonly("step", [](const SlotInfo& s) { return s.identity.step; })
        .def_property_readonly("rank", [](const SlotInfo& s) { return s.identity.rank; })
        .def_property_readonly("world_size", [](const SlotInfo& s) { return s.identity.world_size; })
        .def_property_readonly("fingerprint", [](const SlotInfo& s) { return from_id(s.identity.fingerprint); })
        .def("__repr__", [](const SlotInfo& s) { return describe(s); });

    py::class_<Owner>(m, "Owner", py::is_final())
        .def_readonly("generation", &Owner::generation)
        .def_property_readonly("nonce", [](const Owner& o) { return from_id(o.nonce); })
        .def_readonly("rank", &Owner::rank)
        .def_readonly("world_size", &Owner::world_size)
        .def_readonly("local_world", &Owner::local_world)
        .def_readonly("every", &Owner::every)
        .def_readonly("pid", &Owner::pid)
        .def_readonly("fenced", &Owner::fenced)
        .def_readonly("closed", &Owner::closed)
        .def_readonly("released_at_s", &Owner::released_at_s)
        .def_readonly("restored_generation", &Owner::restored_generation)
        .def_property_readonly("restored_nonce", [](const Owner& o) { return from_id(o.restored_nonce); })
        .def_readonly("restored_step", &Owner::restored_step)
        .def("__repr__", [](const Owner& o) { return describe(o); });

    py::class_<SlotExporter>(m, "_SlotExporter", py::buffer_protocol(), py::module_local())
        .def_buffer([](const SlotExporter& exporter) { return exporter.info(); });

    py::class_<Arena>(m, "Arena", py::is_final())
        .def(py::init<int, bool, bool, bool>(), "fd"_a, py::kw_only(), "writable"_a, "populate"_a = false,
             "exclude_from_fork"_a = false, py::call_guard<NoGil>())
        .def_static(
            "bytes_needed",
            [](py::handle slots, py::handle slot_bytes, py::handle block_bytes) {
                return Geometry::checked(to_unsigned(slots, "slots"), to_unsigned(slot_bytes, "slot_bytes"),
                                         to_unsigned(block_bytes, "block_bytes"))
                    .total_bytes();
            },
            "slots"_a, "slot_bytes"_a, "block_bytes"_a)
        .def_static(
            "format",
            [](int fd, const py::bytes& arena_id, const std::string& job, py::handle local_index, py::handle slots,
               py::handle slot_bytes, py::handle block_bytes) {
                Geometry geometry =
                    Geometry::checked(to_unsigned(slots, "slots"), to_unsigned(slot_bytes, "slot_bytes"),
                                      to_unsigned(block_bytes, "block_bytes"));
                Arena::format(fd, arena_id, job, to_u32(local_index, "local_index"), geometry);
            },
            "fd"_a, py::kw_only(), "arena_id"_a, "job"_a, "local_index"_a, "slots"_a, "slot_bytes"_a, "block_bytes"_a)
        .def_property_readonly("arena_id", [](const Arena& a) { return py::bytes(a.arena_id()); })
        .def_property_readonly("job", &Arena::job)
        .def_property_readonly("local_index", &Arena::local_index)
        .def_property_readonly("slots", [](const Arena& a) { return a.geometry().slots; })
        .def_property_readonly("slot_bytes", [](const Arena& a) { return a.geometry().slot_bytes; })
        .def_property_readonly("block_bytes", [](const Arena& a) { return a.geometry().block_bytes; })
        .def_property_readonly("total_bytes", [](const Arena& a) { return a.geometry().total_bytes(); })
        .def("owner", &Arena::owner)
        .def("set_owner", set_owner, py::kw_only(), "generation"_a, "nonce"_a, "rank"_a, "world_size"_a,
             "local_world"_a, "every"_a, "pid"_a, "fenced"_a = false, "closed"_a = false, "released_at_s"_a = 0,
             "restored_generation"_a = 0, "restored_nonce"_a = py::bytes(std::string(16, '\0')), "restored_step"_a = 0)
        .def_property("passed", read_word<&Header::passed>, write_word<&Header::passed>)
        .def_property("next_step", read_word<&Header::next_step>, write_word<&Header::next_step>)
        .def_property("naming", read_word<&Header::naming>, write_word<&Header::naming>)
        .def_property("committed_step", read_word<&Header::committed_step>, write_word<&Header::committed_step>)
        .def_property("aborted_step", read_word<&Header::aborted_step>, write_word<&Header::aborted_step>)
        .def_property(
            "ever_committed", [](const Arena& a) { return read_word<&Header::ever_committed>(a) != 0; },
            [](const Arena& a, bool value) { write_word<&Header::ever_committed>(a, py::int_(value ? 1 : 0)); })
        .def("wake",
             [](const Arena& a) {
                 std::shared_ptr<Mapping> map = a.mapped_for_writing();
                 Word32& changes = Arena::header_of(*map).changes;
                 changes.fetch_add(1, std::memory_order_release);
                 futex_wake_all(changes, Sharing::between_processes);
             })
        .def("changes",
             [](const Arena& a) { return Arena::header_of(*a.mapped()).changes.load(std::memory_order_acquire); })
        .def("wait_change", wait_change, "seen"_a, "timeout_s"_a)
        .def("slot", &Arena::slot, "index"_a)
        .def("claim", claim, py::kw_only(), "generation"_a, "nonce"_a, "step"_a, "rank"_a, "world_size"_a,
             "fingerprint"_a)
        .def("publish", &Arena::publish, "index"_a, "file_bytes"_a)
        .def("advance", &Arena::advance, "index"_a, "state"_a, "to"_a)
        .def("empty", &Arena::empty, "index"_a)
        .def("slot_view", slot_view, "index"_a)
        .def(
            "slot_offset", [](const Arena& a, uint32_t index) { return a.slot_offset(index); }, "index"_a)
        .def_property_readonly("address", [](const Arena& a) { return reinterpret_cast<uint64_t>(a.mapped()->base); })
        .def(
            "crcs_offset",
            [](const Arena& a, uint32_t index) {
                std::shared_ptr<Mapping> map = a.mapped();
                return reinterpret_cast<const byte*>(a.crc_table(*map, index)) - map->base;
            },
            "index"_a)
        .def(
            "set_block_crcs",
            [](const Arena& a, uint32_t index, uint64_t file_bytes) {
                std::shared_ptr<Mapping> map = a.mapped_for_writing();
                std::vector<uint32_t> made;
                {
                    NoGil release;
                    made = a.set_block_crcs(*map, index, file_bytes);
                }
                return to_words(made, 0, made.size());
            },
            "index"_a, "file_bytes"_a)
        .def("put_block_crcs", put_block_crcs, "index"_a, "file_bytes"_a, "words"_a)
        .def("block_crcs", &Arena::block_crcs, "index"_a)
        .def("crc_words", crc_words, "index"_a, "first"_a = 0, "count"_a = py::none())
        .def(
            "verify",
            [](const Arena& a, uint32_t index, int threads) {
                std::shared_ptr<Mapping> map = a.mapped();
                NoGil release;
                return a.verify(*map, index, threads);
            },
            "index"_a, "threads"_a = 1)
        .def("close", &Arena::close);
    m.def(
        "prefault",
        [](py::handle buffer) {
            Bytes bytes(buffer, true);
            NoGil release;
            prefault(bytes.data(), bytes.size());
        },
        "buffer"_a);
}

}  // namespace snapshotd
