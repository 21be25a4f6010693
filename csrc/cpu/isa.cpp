#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastedit {
namespace {

constexpr Level kAll[] = {Level::kScalar, Level::kAvx2, Level::kAvx2x16, Level::kAvx512};

bool supported(Level level) {
#ifdef FASTEDIT_X86
    // The builtins also ask the operating system whether it saves the wide registers (XGETBV).
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    switch (level) {
        case Level::kScalar:
            return true;
        case Level::kAvx2:
        case Level::kAvx2x16:
            return avx2;
        case Level::kAvx512:
            return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    return false;
#else
    return level == Level::kScalar;
#endif
}

Level best_level() {
    Level best = Level::kScalar;
    for (Level level : kAll)
        if (level != Level::kAvx2x16 && supported(level)) best = level;
    return best;
}

}  // namespace

const char* level_name(Level level) {
    switch (level) {
        case Level::kScalar:
            return "scalar";
        case Level::kAvx2:
            return "avx2";
        case Level::kAvx2x16:
            return "avx2x16";
        case Level::kAvx512:
            return "avx512";
    }
    return "?";
}

std::vector<Level> supported_levels() {
    std::vector<Level> levels;
    for (Level level : kAll)
        if (supported(level)) levels.push_back(level);
    return levels;
}

Level current_level() {
    static const Level best = best_level();
    const char* forced = std::getenv("FASTEDIT_ISA");
    if (forced == nullptr || *forced == '\0') return best;
    std::string known;
    for (Level level : kAll) {
        if (!supported(level)) continue;
        if (std::string(forced) == level_name(level)) return level;
        known += (known.empty() ? "" : ", ") + std::string(level_name(level));
    }
    throw std::invalid_argument("FASTEDIT_ISA must be one of " + known + " on this machine, got '" + forced +
                                "'");
}

}  // namespace fastedit
