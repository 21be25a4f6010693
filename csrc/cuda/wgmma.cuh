// The few instructions of sm_90a that a matrix kernel needs: barriers in shared memory, bulk tensor copies
// with multicast, and asynchronous products of a warpgroup. Names follow the PTX ISA.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastedit {
namespace sm90 {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(std::uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives at the barrier at the same offset in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(std::uint32_t barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Waits until the phase of this parity is over; sees what the cluster wrote before it ended.
__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, std::uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

__device__ __forceinline__ std::uint32_t cluster_rank() {
    std::uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A box of a three-dimensional tensor into shared memory; `barrier` counts its bytes.
__device__ __forceinline__ void copy_box(const CUtensorMap* map, std::uint32_t to, std::uint32_t barrier,
                                         int column, int row, int layer) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(layer)
        : "memory");
}

// The same box to the same offset in every block of the cluster that `blocks` names, each with its own
// barrier.
__device__ __forceinline__ void copy_box_to(const CUtensorMap* map, std::uint32_t to, std::uint32_t barrier,
                                            int column, int row, int layer, std::uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(layer), "h"(blocks)
        : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Descriptor of an operand whose rows of 64 elements run along M or N, one row of 128 bytes per k, in the
// 128-byte swizzle: eight k are 1,024 bytes, the next eight lie behind them; the next 64 elements lie `slab`
// bytes on.
__device__ __forceinline__ std::uint64_t operand(std::uint32_t address, int slab) {
    const std::uint64_t start = (address & 0x3ffff) >> 4;
    const std::uint64_t leading = static_cast<std::uint64_t>(slab >> 4) << 16;
    const std::uint64_t stride = static_cast<std::uint64_t>(1024 >> 4) << 32;
    return start | leading | stride | (std::uint64_t{1} << 62);
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define FASTEDIT_ACCUMULATORS                                                                              \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "     \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, " \
    "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
    "%61, %62, %63}"

#define FASTEDIT_FOUR(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define FASTEDIT_SIXTEEN(x, i) \
    FASTEDIT_FOUR(x, i), FASTEDIT_FOUR(x, i + 4), FASTEDIT_FOUR(x, i + 8), FASTEDIT_FOUR(x, i + 12)

// sums[64 x 128] (+)= a[64 x 16] b[16 x 128]; both operands transposed while they are read. `add` 0 starts
// anew.
#define FASTEDIT_WGMMA(type)                                                                   \
    asm volatile(                                                                              \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                       \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " FASTEDIT_ACCUMULATORS \
        ", %64, %65, add, 1, 1, 1, 1;\n}"                                                      \
        : FASTEDIT_SIXTEEN(sums, 0), FASTEDIT_SIXTEEN(sums, 16), FASTEDIT_SIXTEEN(sums, 32),   \
          FASTEDIT_SIXTEEN(sums, 48)                                                           \
        : "l"(a), "l"(b), "r"(add))

__device__ __forceinline__ void wgmma(float (&sums)[64], std::uint64_t a, std::uint64_t b, int add,
                                      __nv_bfloat16) {
    FASTEDIT_WGMMA("bf16");
}

__device__ __forceinline__ void wgmma(float (&sums)[64], std::uint64_t a, std::uint64_t b, int add, __half) {
    FASTEDIT_WGMMA("f16");
}

#undef FASTEDIT_WGMMA
#undef FASTEDIT_SIXTEEN
#undef FASTEDIT_FOUR
#undef FASTEDIT_ACCUMULATORS

}  // namespace sm90
}  // namespace fastedit
