//! ACPI tables and SMBIOS for the machines.
