// Where pip puts NVIDIA's libraries: told by the module when it is imported.
#pragma once

#include <string>
#include <vector>

namespace snapshotd::gpu {

std::vector<std::string>& library_folders();

}  // namespace snapshotd::gpu
