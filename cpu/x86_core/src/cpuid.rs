//! CPU models.

/// What a processor announces.
#[derive(Debug, Clone)]
pub struct CpuModel {
    /// vCPUs in the machine.
    pub vcpus: u32,
}

/// A model name that is not known.
#[derive(Debug, Clone, thiserror::Error)]
#[error("unknown CPU model \"{0}\"; known are {known}", known = CpuModel::names().join(", "))]
pub struct UnknownModel(pub String);

impl CpuModel {
    /// All names that [`CpuModel::by_name`] takes.
    pub fn names() -> &'static [&'static str] {
        &["max", "qemu64", "x86-64-v1", "x86-64-v2"]
    }
    /// The model of that name.
    pub fn by_name(name: &str) -> Result<Self, UnknownModel> {
        if Self::names().contains(&name) { Ok(Self { vcpus: 1 }) } else { Err(UnknownModel(name.into())) }
    }
    /// With the topology of a machine of `vcpus` processors.
    pub fn with_vcpus(self, vcpus: u32) -> Self {
        Self { vcpus }
    }
    /// Family, model and stepping as CPUID leaf 1 has them in EAX.
    pub fn signature(&self) -> u32 {
        0x00b0_0f10
    }
    /// The bits that physical addresses have.
    pub fn physical_mask(&self) -> u64 {
        (1 << 48) - 1
    }
    /// Whether 1 GiB pages exist.
    pub fn gigabyte_pages(&self) -> bool {
        true
    }
}
