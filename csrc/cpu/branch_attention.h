// Attention of short branches over rows of a shared store and over their own tokens: what the driver and the
// per-level kernels share.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace fastedit {

enum class BranchType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A [tokens, heads, d] tensor with unit stride along d, strides in elements.
struct BranchRows {
    void* data;
    BranchType type;
    std::int64_t token_stride, head_stride;
};

struct BranchAttentionArgs {
    BranchRows q;                   // [queries, heads, d]
    BranchRows k, v;                // [tokens, groups, d]
    BranchRows k_prefix, v_prefix;  // [stored, groups, d]
    const std::int64_t* columns;    // [branches, width] rows of the store, then -1
    const std::int64_t* q_starts;   // [branches + 1]
    const std::int64_t* q_offsets;  // [queries]
    const std::int64_t* k_starts;   // [branches + 1]
    std::int64_t branches, width, queries, tokens, stored, heads, groups, d;
    double scale, softcap;  // softcap 0: none
    std::int64_t window;    // 0: none
    float* lse;             // [queries, heads], written by the forward, read by the backward
    BranchRows out;         // of q's shape: the forward's result, the backward's gradient in q
    // Backward only.
    BranchRows grad;    // of the result
    BranchRows dk, dv;  // of k's shape
    int threads;
    // Filled in by the driver: the most own keys of a branch, and the most keys, prefix included.
    std::int64_t most_own, most_keys;
};

FASTEDIT_DECLARE_LEVELS(
    // Bytes of scratch memory that a unit needs.
    std::int64_t branch_attention_scratch(const BranchAttentionArgs& args);
    // A unit is one key head of one branch, with all query heads that read it. It writes what no other unit
    // does: the result and its log-sum-exp, or the gradients.
    void branch_attention_forward(const BranchAttentionArgs& args, std::int64_t branch, std::int64_t group,
                                  void* scratch);
    void branch_attention_backward(const BranchAttentionArgs& args, std::int64_t branch, std::int64_t group,
                                   void* scratch);)

// Throws std::out_of_range when the index tensors point outside of the others.
void branch_attention(const BranchAttentionArgs& args);
void branch_attention_backward(const BranchAttentionArgs& args);

}  // namespace fastedit
