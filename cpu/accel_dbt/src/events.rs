//! What happened to a vCPU and has not been dealt with yet.

use crate::shared::Requests;
use accel::InjectedException;

/// Events that were noted and not dealt with yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Events {
    /// Waits for a SIPI.
    pub(crate) waiting: bool,
    /// How many NMIs wait. A processor latches one while another is handled; one more can wait here, which on the
    /// processor would have been taken at once.
    pub(crate) nmis: u8,
    /// An SMI waits. It is no part of saved states: only a hypervisor in the guest could miss it, which could do
    /// nothing else about it than to let the processor take it, and there is nothing that it would be taken to.
    pub(crate) smi: bool,
    pub(crate) init: bool,
    pub(crate) sipi: Option<u8>,
    /// Only from a restored state: this back end delivers at once.
    pub(crate) exception: Option<InjectedException>,
    /// Likewise.
    pub(crate) interrupt: Option<u8>,
}

impl Events {
    /// As after power-on.
    pub(crate) fn at_reset(id: u32) -> Self {
        Self { waiting: id != 0, ..Self::default() }
    }

    /// Takes over requests.
    pub(crate) fn note(&mut self, requests: Requests) {
        if requests.has(Requests::INIT) {
            self.init = true;
            self.sipi = None;
        }
        if let Some(vector) = requests.sipi() {
            self.sipi.get_or_insert(vector);
        }
        self.smi |= requests.has(Requests::SMI);
        self.nmis = (self.nmis + requests.nmis()).min(2);
    }
}
