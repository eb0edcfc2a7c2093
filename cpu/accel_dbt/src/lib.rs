//! The translator as an accelerator: vCPU threads, interrupts and exclusive sections.
