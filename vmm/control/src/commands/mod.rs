//! All commands, by what they are about.

mod about;
mod vm;

use crate::command::Table;
use crate::vm_events as vm_event;

/// All commands and events.
pub(crate) fn table() -> Table {
    let mut commands = about::commands();
    commands.extend(vm::commands());
    let mut table = Table::new(commands);
    table.add_event::<vm_event::Stop>();
    table.add_event::<vm_event::Resume>();
    table.add_event::<vm_event::Powerdown>();
    table.add_event::<vm_event::Suspend>();
    table.add_event::<vm_event::Wakeup>();
    table.add_event::<vm_event::Shutdown>();
    table.add_event::<vm_event::Reset>();
    table.add_event::<vm_event::GuestPanicked>();
    table.add_event::<vm_event::GuestCrashLoaded>();
    table
}
