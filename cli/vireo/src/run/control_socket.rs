//! `--qmp`: programs that control the VM.

use super::Options;
use crate::accelerator::Kind;
use anyhow::{Context, Result};
use chardev::ChardevSpec;
use control::{Bound, Ear, Endpoint, Server, VmFacts};
use machine::{MachineKind, MachineSpec, Vm};
use std::sync::Arc;

/// Begins to listen.
pub(super) fn bind(endpoints: &[Endpoint]) -> Result<Vec<Bound>> {
    let bound = endpoints.iter().map(Endpoint::bind).collect::<Result<Vec<_>, _>>()?;
    for address in bound.iter().filter_map(Bound::address) {
        if matches!(address, control::Address::Tcp { .. }) {
            eprintln!("vireo: {address} controls the VM");
        }
    }
    Ok(bound)
}

/// Begins to serve clients, if there are to be any.
pub(super) fn serve(
    sockets: Vec<Bound>,
    options: &Options,
    spec: &MachineSpec,
    accelerator: Kind,
    vm: &mut Vm,
) -> Result<Option<Server>> {
    if sockets.is_empty() {
        return Ok(None);
    }
    if options.paused {
        vm.hold();
    }
    let ear = Ear::default();
    let hears = ear.clone();
    vm.listen(Arc::new(move |event| hears.hear(&event)));
    let machine = MachineKind::NAMES.iter().find(|(_, kind)| *kind == spec.kind);
    let facts = VmFacts {
        name: options.name.clone(),
        uuid: "00000000-0000-0000-0000-000000000000".into(),
        vcpus: spec.vcpus,
        memory: spec.memory,
        machine: machine.map_or("", |(name, _)| name).into(),
        kvm: accelerator == Kind::Kvm,
        kvm_present: std::path::Path::new("/dev/kvm").exists(),
        chardevs: chardevs(spec),
    };
    let hears = ear.clone();
    let disks = vm.storage(Arc::new(move |event| hears.hear_job(&event)))?;
    let server = Server::start(sockets, Arc::new(vm.handle()), facts, &ear, Some(disks));
    server.map(Some).context("cannot start a thread")
}

/// What serial ports and consoles are connected to.
fn chardevs(spec: &MachineSpec) -> Vec<(String, String)> {
    let place = |chardev: &ChardevSpec| match chardev {
        ChardevSpec::Stdio => "stdio".to_owned(),
        ChardevSpec::Pty => "pty".to_owned(),
        ChardevSpec::Null => "null".to_owned(),
        ChardevSpec::File(path) => format!("file:{}", path.display()),
        ChardevSpec::Unix { path, server, .. } => {
            format!("unix:{}{}", path.display(), if *server { ",server=on" } else { "" })
        }
    };
    let serials = spec.serials.iter().enumerate();
    let serials = serials.map(|(n, chardev)| (format!("serial{n}"), place(chardev)));
    serials.chain(spec.console.iter().map(|chardev| ("console0".to_owned(), place(chardev)))).collect()
}
