//! Loading kernels: bzImage, PVH and multiboot ELF.
