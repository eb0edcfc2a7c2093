//! All commands, by what they are about.

mod about;
mod vm;

use crate::command::Table;
use crate::vm_events;

/// All commands and events.
pub(crate) fn table() -> Table {
    let mut commands = about::commands();
    commands.extend(vm::commands());
    let mut table = Table::new(commands);
    vm_events::add(&mut table);
    table
}
