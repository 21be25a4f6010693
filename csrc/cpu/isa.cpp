#include "cpu/isa.h"

#ifdef FASTEDIT_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastedit {
namespace {

constexpr Level kAll[] = {Level::kScalar, Level::kAvx2, Level::kAvx2x16, Level::kAvx512, Level::kAmx};

#ifdef FASTEDIT_AMX
// AMX has three conditions: the processor (leaf 7: tiles, bf16 on them, bf16 conversion), the operating
// system (XCR0), and a permission that Linux gives a process, its threads and its children when they ask.
bool amx_permitted() {
    constexpr unsigned kBf16Tiles = 1u << 22, kTiles = 1u << 24, kBf16 = 1u << 5, kTileState = 3u << 17;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBf16Tiles) == 0) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kBf16) == 0) return false;
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool amx() {
#ifdef FASTEDIT_AMX
    static const bool permitted = amx_permitted();
    return permitted;
#else
    return false;
#endif
}

bool supported(Level level) {
#ifdef FASTEDIT_X86
    // The builtins also ask the operating system whether it saves the wide registers (XGETBV).
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (level) {
        case Level::kScalar:
            return true;
        case Level::kAvx2:
        case Level::kAvx2x16:
            return avx2;
        case Level::kAvx512:
            return avx512;
        case Level::kAmx:
            return avx512 && amx();
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
        case Level::kAmx:
            return "amx";
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
