//! The host x86-64 emitter and the code cache.
