//! Machine types: small functions, one per device family, that wire a VM.
