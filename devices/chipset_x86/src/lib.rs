//! The PC's chipset: PIC, PIT, I/O APIC, HPET, RTC, i8042, power management, debug-exit and pvpanic.
