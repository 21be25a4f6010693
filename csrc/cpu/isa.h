// Instruction-set levels of the CPU kernels and how a call finds the one for this machine.
#pragma once

#include <vector>

namespace fastedit {

// Ordered: a later level is preferred. kAvx2x16 is the AVX-512 shape of the templates lowered to AVX2, so
// that tests reach that code on machines without AVX-512; it is never chosen unless asked for. kAmx is
// AVX-512 with tiles of bf16: ops that have a kernel for it ask for the level, the others run their AVX-512
// one.
enum class Level { kScalar, kAvx2, kAvx2x16, kAvx512, kAmx };

const char* level_name(Level level);

// The levels this machine can run, best last.
std::vector<Level> supported_levels();

// The level for this call: FASTEDIT_ISA if it is set (std::invalid_argument when the machine lacks it or the
// name is unknown), else the best. Read at every call, so that a test can go through all of them.
Level current_level();

}  // namespace fastedit

// FASTEDIT_PICK(kernel): the copy for this call of a kernel declared with FASTEDIT_DECLARE_LEVELS
// (cpu/levels.h).
#ifdef FASTEDIT_X86
#define FASTEDIT_PICK(kernel)                                                                   \
    (::fastedit::current_level() >= ::fastedit::Level::kAvx512    ? ::fastedit::avx512::kernel  \
     : ::fastedit::current_level() == ::fastedit::Level::kAvx2x16 ? ::fastedit::avx2x16::kernel \
     : ::fastedit::current_level() == ::fastedit::Level::kAvx2    ? ::fastedit::avx2::kernel    \
                                                                  : ::fastedit::scalar::kernel)
#else
#define FASTEDIT_PICK(kernel) ((void)::fastedit::current_level(), ::fastedit::scalar::kernel)
#endif
