//! The x86 processor core: architectural state, soft MMU, segmentation, exceptions, MSRs and CPUID.
