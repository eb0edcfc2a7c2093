//! T0, the x86 interpreter.
