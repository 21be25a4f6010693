// bfloat16 and float16 in the per-level kernels: widening, and narrowing with round to nearest even.
//
// For csrc/cpu/<op>_kernel.cpp only: everything is in an unnamed namespace of the level, see cpu/levels.h.
#pragma once

#include <cstdint>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fastedit {
namespace FASTEDIT_LEVEL {
namespace {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float float_of(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(float value) {
    return value;
}
inline float widen(BFloat16 value) {
    return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}
inline float widen(Float16 value) {
#ifdef __F16C__
    return _cvtsh_ss(value.bits);
#else
    // Shifts the exponent into place and multiplies by 2^112, which also normalises denormals; 65536 and more
    // can only come from the infinity and NaN encodings, whose exponent is then set to all ones.
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const float scaled = float_of(static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13) * 0x1p112f;
    const std::uint32_t special = scaled >= 65536.0f ? 0x7f800000u : 0u;
    return float_of(bits_of(scaled) | special | sign);
#endif
}

inline void narrow(float value, float& out) {
    out = value;
}
inline void narrow(double value, float& out) {
    out = static_cast<float>(value);
}
// Without branches, so that loops over it become vector code.
inline void narrow(float value, BFloat16& out) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (bits >> 16) | 0x40u;
    out.bits = static_cast<std::uint16_t>(value == value ? rounded : quiet);
}
inline void narrow(float value, Float16& out) {
#ifdef __F16C__
    out.bits = static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const std::uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    std::uint32_t half;
    if (size > 0x7f800000u) {
        half = 0x7e00u | ((size >> 13) & 0x3ffu);
    } else if (size >= 0x47800000u) {
        half = 0x7c00u;
    } else if (size < 0x38800000u) {
        // Below 2^-14 halves are multiples of 2^-24, the spacing of floats at 0.5: the addition rounds.
        half = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
    } else {
        half = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    }
    out.bits = static_cast<std::uint16_t>(half | sign);
#endif
}

}  // namespace
}  // namespace FASTEDIT_LEVEL
}  // namespace fastedit
