#include "arena.hpp"
#include "bindings.hpp"
#include "copy.hpp"
#include "engine.hpp"
#include "plan.hpp"

namespace snapshotd {

namespace {

bool wait_copy(const Engine& engine, double timeout_s) {
    bool over = false;
    wait_for(timeout_s, [&](Clock::time_point deadline) {
        Woken woken = engine.wait(deadline);
        over = woken == Woken::changed;
        return woken;
    });
    return over;
}

Piece piece_of(const Bytes& to, const Bytes& from) {
    if (to.size() != from.size()) throw std::invalid_argument("dst and src must have the same length");
    return {to.data(), from.data(), to.size()};
}

// From one buffer to one, or from each of many to its own.
void copy(py::handle dst, py::handle src, int threads) {
    std::vector<std::unique_ptr<Bytes>> held;
    auto hold = [&](py::handle object, bool writable) -> const Bytes& {
        return *held.emplace_back(std::make_unique<Bytes>(object, writable));
    };
    std::vector<Piece> pieces;
    if (PyObject_CheckBuffer(dst.ptr())) {
        pieces = shares_of(piece_of(hold(dst, true), hold(src, false)), threads);
    } else {
        auto to = py::cast<std::vector<py::object>>(dst), from = py::cast<std::vector<py::object>>(src);
        if (to.size() != from.size()) throw std::invalid_argument("dst and src must have the same count of buffers");
        for (size_t i = 0; i < to.size(); ++i) pieces.push_back(piece_of(hold(to[i], true), hold(from[i], false)));
    }
    NoGil release;
    copy_plain(pieces, threads);
}

}  // namespace

void bind_engine(py::module_& m) {
    py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", py::is_final())
        .def(py::init([](py::handle file_bytes, py::handle now, py::handle later) {
                 return std::make_shared<Plan>(to_unsigned(file_bytes, "file_bytes"), to_items(now, "now"),
                                               to_items(later, "later"));
             }),
             py::kw_only(), "file_bytes"_a, "now"_a, "later"_a)
        .def_property_readonly("file_bytes", [](const Plan& plan) { return plan.file_bytes; })
        .def(
            "repoint",
            [](Plan& plan, py::handle now, py::handle later) {
                plan.repoint(to_pointers(now, "now"), to_pointers(later, "later"));
            },
            "now"_a, "later"_a);

    py::class_<Engine>(m, "Engine", py::is_final())
        .def(py::init<Arena&, int>(), "arena"_a, "threads"_a, py::keep_alive<1, 2>())
        .def("calibrate",
             [](Engine& engine) {
                 NoGil release;
                 return std::string(engine.calibrate() == Stores::temporal ? "temporal" : "non-temporal");
             })
        .def(
            "begin",
            [](Engine& engine, std::shared_ptr<Plan> plan, uint32_t index, int notify_fd) {
                NoGil release;
                engine.begin(std::move(plan), index, notify_fd);
            },
            "plan"_a, "index"_a, "notify_fd"_a = -1)
        .def(
            "copy_now",
            [](const Engine& engine, std::shared_ptr<Plan> plan, uint32_t index) {
                NoGil release;
                engine.copy_now(*plan, index);
            },
            "plan"_a, "index"_a)
        .def("running", &Engine::running)
        .def("wait", wait_copy, "timeout_s"_a)
        .def("cancel", &Engine::cancel, py::call_guard<NoGil>())
        .def("seconds", &Engine::seconds)
        .def("close", &Engine::close, py::call_guard<NoGil>());

    m.def(
        "scatter",
        [](py::handle view, py::handle items, int threads, py::handle origin_given, py::handle file_bytes_given) {
            Bytes window(view);
            uint64_t origin = to_unsigned(origin_given, "origin");
            uint64_t file_bytes =
                file_bytes_given.is_none() ? window.size() : to_unsigned(file_bytes_given, "file_bytes");
            if (origin > file_bytes || window.size() > file_bytes - origin) {
                throw std::invalid_argument("the window reaches beyond file_bytes");
            }
            ItemTable table("scatter", to_items(items, "scatter"), file_bytes);
            NoGil release;
            scatter(window.data(), origin, window.size(), table, threads);
        },
        "view"_a, "items"_a, "threads"_a = 1, py::kw_only(), "origin"_a = 0, "file_bytes"_a = py::none());
    m.def("copy", copy, "dst"_a, "src"_a, "threads"_a = 1);
}

}  // namespace snapshotd
