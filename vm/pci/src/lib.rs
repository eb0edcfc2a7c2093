//! PCI Express: configuration space, BARs, MSI-X, ECAM and the legacy configuration ports.
