//! The list of all drivers.

use block_graph::Registry;

/// All drivers. Of formats that are as sure of a file as each other the first counts.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.add(qcow2::Qcow2Kind);
    registry.add(luks::LuksKind);
    block_file::register(&mut registry);
    block_filters::register(&mut registry);
    registry.add(nbd::client::NbdKind::new(std::sync::Arc::default()));
    registry
}
