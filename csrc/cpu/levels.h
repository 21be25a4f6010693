// How a kernel is compiled once per instruction-set level.
//
// A kernel lives in csrc/cpu/<op>_kernel.cpp, in namespace fastedit::FASTEDIT_LEVEL. Such a file includes no
// C++ standard header with inline code: the linker could keep the AVX-512 copy of a shared inline function
// for everybody. FASTEDIT_DECLARE_LEVELS(void kernel(const Args&);) declares every copy; FASTEDIT_PICK
// (cpu/isa.h) finds the one to call.
#pragma once

#ifdef FASTEDIT_X86
#define FASTEDIT_DECLARE_LEVELS(...) \
    namespace scalar {               \
    __VA_ARGS__                      \
    }                                \
    namespace avx2 {                 \
    __VA_ARGS__                      \
    }                                \
    namespace avx2x16 {              \
    __VA_ARGS__                      \
    }                                \
    namespace avx512 {               \
    __VA_ARGS__                      \
    }
#else
#define FASTEDIT_DECLARE_LEVELS(...) \
    namespace scalar {               \
    __VA_ARGS__                      \
    }
#endif
