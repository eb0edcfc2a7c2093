//! T1, the single-pass x86-64 translator.
