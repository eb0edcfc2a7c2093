//! x87, MMX and SSE instructions run as native stubs.
