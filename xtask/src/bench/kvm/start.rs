//! The CPU time that a monitor takes before the guest's first instruction: the kernel traces its scheduling
//! from exec to the first entry into the guest.

use super::vmm::{GuestSpec, Running, Vmm};
use super::{Setting, order_of};
use crate::Outcome;
use crate::bench::statistics::median;
use anyhow::{Context, Result, bail};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The kernel's tracing file system.
const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: &[&str] =
    &["sched/sched_switch", "sched/sched_process_exec", "sched/sched_process_fork", "kvm/kvm_entry"];

pub(super) fn run(setting: &Setting<'_>) -> Outcome {
    if !Path::new(TRACING).join("events/kvm/kvm_entry").is_dir() {
        println!(
            "\nleft out: CPU time before the guest's first instruction; {TRACING} is not mounted or not readable"
        );
        return Ok(());
    }
    let mut contestants: Vec<(&Vmm, &str, PathBuf)> = Vec::new();
    for vmm in &setting.vmms {
        if vmm.takes_bzimage() {
            contestants.push((vmm, "bzImage", setting.parts.bzimage()));
        }
        contestants.push((vmm, "vmlinux", setting.parts.vmlinux()));
    }
    let mut times: Vec<[Vec<f64>; 2]> = vec![Default::default(); contestants.len()];
    for round in 0..setting.runs {
        for index in order_of(round, contestants.len()) {
            let ((vmm, kind, kernel), times) = (&contestants[index], &mut times[index]);
            let (cpu, wall) =
                once(setting, vmm, kernel).with_context(|| format!("tracing {} with {kind}", vmm.name()))?;
            times[0].push(cpu * 1e3);
            times[1].push(wall * 1e3);
        }
    }
    println!("\nFrom exec to the guest's first instruction, {} runs", setting.runs);
    println!("{:<18} {:<8} {:>12} {:>12} {:>10}", "", "kernel", "CPU ms", "elapsed ms", "to vireo");
    for ((vmm, kind, _), own) in contestants.iter().zip(&times) {
        let ratio = median(&own[0]) / median(&times[0][0]);
        println!(
            "{:<18} {kind:<8} {:>12.1} {:>12.1} {ratio:>10.2}",
            vmm.name(),
            median(&own[0]),
            median(&own[1])
        );
    }
    Ok(())
}

fn set(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACING).join(file);
    fs::write(&path, value).with_context(|| format!("writing {value:?} to {}", path.display()))
}

/// Seconds of CPU time and of real time.
fn once(setting: &Setting<'_>, vmm: &Vmm, kernel: &Path) -> Result<(f64, f64)> {
    let initrd = setting.parts.initrd();
    let guest = GuestSpec {
        kernel,
        initrd: Some(&initrd),
        append: "",
        memory: setting.memory,
        disk: None,
        tuned: false,
    };
    set("tracing_on", "0")?;
    set("trace", "")?;
    set("trace_clock", "mono")?;
    set("options/event-fork", "1")?;
    set("set_event_pid", "")?;
    for event in EVENTS {
        set(&format!("events/{event}/enable"), "1")?;
    }
    // A shell has itself traced and becomes the monitor: threads and children are traced with it.
    let monitor = vmm.command(&guest)?;
    let mut shell = Command::new("sh");
    let script = format!("echo $$ >{TRACING}/set_event_pid && echo 1 >{TRACING}/tracing_on && exec \"$@\"");
    shell.args(["-c", &script, "sh"]).arg(monitor.get_program()).args(monitor.get_args());
    let running = Running::start(shell)?;
    let process = running.child.id();
    let end = Instant::now() + Duration::from_secs(60);
    let trace = loop {
        let text = fs::read_to_string(Path::new(TRACING).join("trace")).context("reading the trace")?;
        if text.contains("kvm_entry:") {
            break text;
        }
        if Instant::now() > end {
            bail!("the guest was not entered within a minute");
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    set("tracing_on", "0")?;
    for event in EVENTS {
        set(&format!("events/{event}/enable"), "0")?;
    }
    drop(running);
    cpu_time(&trace, process).context("the trace does not show exec and the guest's first instruction")
}

/// An event of the trace: the processor, the time in seconds, the event's name and text.
fn parse(line: &str) -> Option<(&str, f64, &str, &str)> {
    let open = line.find(" [")?;
    let (cpu, rest) = line[open + 2..].split_once(']')?;
    let mut words = rest.trim_start().splitn(2, char::is_whitespace);
    words.next()?; // flags
    let (time, rest) = words.next()?.trim_start().split_once(": ")?;
    let (name, text) = rest.split_once(": ")?;
    Some((cpu, time.parse().ok()?, name, text))
}

/// A number that stands behind `key` in an event's text.
fn number(text: &str, key: &str) -> Option<u32> {
    let rest = &text[text.find(key)? + key.len()..];
    rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
}

/// Seconds of CPU time of all traced tasks, and of real time, from the exec of `process` to the first entry
/// into the guest. Tracing must have been limited to the monitor's tasks.
fn cpu_time(trace: &str, process: u32) -> Option<(f64, f64)> {
    let mut began = None;
    // The time since which each processor runs a task of the monitor's, by processor.
    let mut since: HashMap<&str, f64> = HashMap::new();
    let mut tasks = HashSet::from([process]);
    let mut total = 0.0;
    for (cpu, time, name, text) in trace.lines().filter(|line| !line.starts_with('#')).filter_map(parse) {
        match name {
            // The last program that the process becomes is the monitor.
            "sched_process_exec" if number(text, " pid=") == Some(process) => {
                (began, total) = (Some(time), 0.0);
                since = HashMap::from([(cpu, time)]);
            }
            "sched_process_fork" if tasks.contains(&number(text, " pid=")?) => {
                tasks.insert(number(text, "child_pid=")?);
            }
            "sched_switch" => {
                total += since.remove(cpu).map_or(0.0, |start| time - start);
                if tasks.contains(&number(text, "next_pid=")?) {
                    since.insert(cpu, time);
                }
            }
            "kvm_entry" => {
                let began = began?;
                total += since.values().map(|start| time - start).sum::<f64>();
                return Some((total, time - began));
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::cpu_time;

    #[test]
    fn a_trace_is_added_up() {
        let trace = "# tracer: nop
              sh-7     [000] d..2.    10.000000: sched_switch: prev_comm=sh prev_pid=7 prev_prio=120 prev_state=S ==> next_comm=x next_pid=3 next_prio=120
              sh-7     [000] .....    11.000000: sched_process_exec: filename=/bin/vireo pid=7 old_pid=7
           vireo-7     [000] .....    11.100000: sched_process_fork: comm=vireo pid=7 child_comm=vireo child_pid=8
           vireo-7     [000] d..2.    11.200000: sched_switch: prev_comm=vireo prev_pid=7 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
          <idle>-0     [001] d..2.    11.300000: sched_switch: prev_comm=swapper/1 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=vcpu-0 next_pid=8 next_prio=120
          vcpu-0-8     [001] d..2.    11.700000: kvm_entry: vcpu 0, rip 0x1000200
";
        let (cpu, wall) = cpu_time(trace, 7).unwrap();
        assert!((cpu - 0.6).abs() < 1e-6 && (wall - 0.7).abs() < 1e-6, "{cpu} {wall}");
        assert_eq!(cpu_time("nothing", 7), None);
    }
}
