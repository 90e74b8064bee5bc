// Instruction sets the CPU kernels are compiled for, and which of them this machine can run.
#pragma once

#include <cstdint>
#include <vector>

namespace irlfast {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

const char* isa_name(Isa isa);

// Compiled into this library, narrowest first.
std::vector<Isa> built_isas();

// Compiled in, and supported by both the processor and the operating system's saved register state.
bool isa_runs_here(Isa isa);

// The widest that runs here.
Isa best_isa();

}  // namespace irlfast
