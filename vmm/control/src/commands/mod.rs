//! All commands, by what they are about.

mod about;
mod bitmaps;
mod block_query;
mod block_types;
mod blockdev_options;
mod copies;
mod nodes;
mod running_jobs;
mod snapshots;
mod vm;

use crate::block_events as block_event;

use crate::command::Table;
use crate::vm_events as vm_event;

/// All commands and events.
pub(crate) fn table() -> Table {
    let mut commands = about::commands();
    commands.extend(vm::commands());
    commands.extend(block_query::commands());
    commands.extend(nodes::commands());
    commands.extend(snapshots::commands());
    commands.extend(bitmaps::commands());
    commands.extend(copies::commands());
    commands.extend(running_jobs::commands());
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
    table.add_event::<vm_event::BlockIoError>();
    table.add_event::<block_event::JobStatusChange>();
    table.add_event::<block_event::BlockJobReady>();
    table.add_event::<block_event::BlockJobCompleted>();
    table.add_event::<block_event::BlockJobCancelled>();
    table.add_event::<block_event::BlockJobPending>();
    table.add_event::<block_event::BlockJobError>();
    table
}
