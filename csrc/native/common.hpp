// What every file of the native module shares: its errors, its view of bytes, its knowledge of forks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace snapshotd {

using byte = unsigned char;

// The file is not an arena of this version. Becomes ArenaFormatError in Python.
struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The operating system refused. Becomes OSError with this errno.
struct OsError : std::runtime_error {
    OsError(int code, const std::string& what) : std::runtime_error(what), code(code) {}
    int code;
};

// Something is in use and cannot be let go of now. Becomes BufferError.
struct InUseError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// How often this process is the child of a fork, counted from the first load of the module: threads and
// MADV_DONTFORK mappings made at another count do not exist here. Cheaper than getpid() at every access.
uint32_t fork_count() noexcept;

}  // namespace snapshotd
