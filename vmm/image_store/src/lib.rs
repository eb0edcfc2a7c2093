//! The user's image store and the Debian kernels and initramfs it fetches.
