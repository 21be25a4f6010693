#include "cpu/peak.h"

#include <cstdint>
#include <cstring>
#include <ctime>
#include <stdexcept>

#include "cpu/buffer.h"
#include "cpu/isa.h"

namespace fastedit {
namespace {

// Of this thread and not of the wall: other processes must not lower a ceiling.
double processor_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

using Loop = double (*)();

Loop loop_of(const std::string& kind) {
    if (kind == "fma_f32") return FASTEDIT_PICK(peak_fma_f32);
    if (kind == "fma_f64") return FASTEDIT_PICK(peak_fma_f64);
    if (kind == "amx_bf16") {
#ifdef FASTEDIT_AMX
        if (current_level() == Level::kAmx) return amx::peak_bf16;
#endif
        throw std::invalid_argument("kind 'amx_bf16' needs the level amx, this machine or FASTEDIT_ISA has " +
                                    std::string(level_name(current_level())));
    }
    throw std::invalid_argument("kind must be 'amx_bf16', 'fma_f32' or 'fma_f64', got '" + kind + "'");
}

}  // namespace

double peak(const std::string& kind, double seconds) {
    if (!(seconds > 0)) throw std::invalid_argument("seconds must be positive");
    const Loop loop = loop_of(kind);
    loop();  // lets the clock settle
    // The best of several rounds: what disturbs a loop in registers only slows it down.
    double best = 0, spent = 0;
    while (spent < seconds) {
        const double start = processor_seconds();
        const double flops = loop();
        const double took = processor_seconds() - start;
        spent += took;
        if (took > 0 && flops / took > best) best = flops / took;
    }
    return best;
}

double bandwidth() {
    constexpr std::size_t kBytes = std::size_t{256} << 20;  // more than the caches a core has to itself
    const Buffer<char> from(kBytes), to(kBytes);
    std::memset(from.get(), 1, kBytes);
    std::memset(to.get(), 0, kBytes);
    double best = 0;
    for (int round = 0; round < 5; ++round) {
        const double start = processor_seconds();
        std::memcpy(to.get(), from.get(), kBytes);
        const double took = processor_seconds() - start;
        if (took > 0 && 2.0 * kBytes / took > best) best = 2.0 * kBytes / took;
    }
    return best;
}

}  // namespace fastedit
