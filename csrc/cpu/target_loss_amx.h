// Head, soft-max and their gradient with AMX tiles: what the driver and the kernel share.
//
// Numbers become planes of bf16 that add up to them: one plane for bf16, two for fp16, three for fp32, each
// exactly what the ones before it leave. A product of two planes is exact in fp32; products below 2^-24 of
// the whole are left out, as fp32 arithmetic would.
#pragma once

#include <cstdint>

namespace fastedit {

enum class HeadType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct TargetLossArgs {
    const void* weight;  // [vocabulary, d], unit stride along a row
    HeadType weight_type;
    std::int64_t weight_stride, vocabulary, d;
    const float* bias;     // [vocabulary] or null
    const float* hidden;   // [rows, d] without gaps
    HeadType hidden_type;  // that it was widened from
    std::int64_t rows;
    const std::int64_t* targets;  // [rows]
    const std::int64_t* kl_rows;  // [kl]
    const float* kl_logp;         // [kl, vocabulary]
    std::int64_t kl, kl_stride;
    float softcap;  // 0 for none
    bool with_grad;
    int threads;
};

// What a part of the vocabulary makes of some rows. Sums are relative to e^peak.
struct TargetLossSums {
    float *peak, *total, *picked;  // [rows]: greatest logit, sum of e^z, logit of the target
    float* gap;                    // [kl]: sum of e^z (z - log p0)
    float* pulls;  // [rows + kl, width]: sums of the same weights, times z', times the head's rows
};

constexpr std::int64_t kTargetTile = 16, kTargetStep = 32;  // rows of a tile; elements of its inner dimension
constexpr std::int64_t kTargetRows = 128;                   // rows of H that run together

// Some rows of H with the divergences that are taken there.
struct TargetLossBlock {
    std::int64_t first, rows;
    const std::int64_t* kl;        // which of args.kl_rows
    const std::int64_t* kl_place;  // their rows, from `first`
    std::int64_t kl_count;
    const char* packed;  // target_loss_pack

    std::int64_t padded() const { return (rows + kTargetTile - 1) / kTargetTile * kTargetTile; }
    std::int64_t pulled() const { return (rows + kl_count + kTargetTile - 1) / kTargetTile * kTargetTile; }
};

inline std::int64_t target_loss_width(const TargetLossArgs& args) {
    return (args.d + kTargetStep - 1) / kTargetStep * kTargetStep;
}
inline int target_loss_planes(HeadType type) {
    return type == HeadType::kBFloat16 ? 1 : type == HeadType::kFloat16 ? 2 : 3;
}

#ifdef FASTEDIT_AMX
namespace amx {
// Rows of H as right operands: [plane][tile of rows][step along d] of 1 KB.
void target_loss_pack(const TargetLossArgs& args, std::int64_t first, std::int64_t rows, char* packed);
std::int64_t target_loss_scratch(const TargetLossArgs& args, const TargetLossBlock& block);
// Columns [first, last) of the vocabulary. sums.pulls is [block.pulled(), width].
void target_loss_part(const TargetLossArgs& args, const TargetLossBlock& block, std::int64_t first,
                      std::int64_t last, const TargetLossSums& sums, char* scratch);
}  // namespace amx
#endif

// sums.pulls: [rows + kl, d], and all of it without gaps. Not to be called below the level amx.
void target_loss(const TargetLossArgs& args, const TargetLossSums& sums);

}  // namespace fastedit
