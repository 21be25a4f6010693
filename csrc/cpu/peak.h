// What this machine reaches at most: the ceilings that results of benches are read against.
#pragma once

#include <string>

#include "cpu/levels.h"

namespace fastedit {

FASTEDIT_DECLARE_LEVELS(
    // A fixed number of rounds of multiply-adds in registers; returns its flops.
    double peak_fma_f32(); double peak_fma_f64();)

#ifdef FASTEDIT_AMX
namespace amx {
double peak_bf16();
}
#endif

// flop/s of one thread, registers only, over about `seconds` of processor time. kind: "amx_bf16", "fma_f32"
// or "fma_f64"; std::invalid_argument for another and where FASTEDIT_ISA or the machine has no such
// instructions.
double peak(const std::string& kind, double seconds);

// bytes/s of one thread that reads one large array and writes another.
double bandwidth();

}  // namespace fastedit
