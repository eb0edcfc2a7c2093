//! What a VM took of the host's processors, for people.

use machine::CpuUse;
use placement::CpuTime;
use std::fmt::Write;

/// A table with a line for each vCPU, and one for everything else.
pub(super) fn table(cpu_use: &CpuUse) -> String {
    let mut text =
        format!("{:<10} {:>10} {:>10} {:>10} {:>10}\n", "CPU time", "total", "user", "system", "waiting");
    let seconds = |duration: std::time::Duration| format!("{:.2}s", duration.as_secs_f64());
    let mut line = |name: &str, time: &CpuTime, waiting: &str| {
        let [total, user, system] = [time.total(), time.user, time.system].map(seconds);
        // Writing to a text does not fail.
        let _ = writeln!(text, "{name:<10} {total:>10} {user:>10} {system:>10} {waiting:>10}");
    };
    for (number, time) in cpu_use.vcpus.iter().enumerate() {
        line(&format!("vcpu-{number}"), time, &seconds(time.waiting));
    }
    line("io", &cpu_use.io, "-");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_line_for_each() {
        let [user, system, waiting] = [1500, 20, 7].map(Duration::from_millis);
        let time = CpuTime { user, system, waiting };
        let text = table(&CpuUse { vcpus: vec![CpuTime::default(), time], io: time });
        let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines[0], ["CPU", "time", "total", "user", "system", "waiting"]);
        assert_eq!(lines[2], ["vcpu-1", "1.52s", "1.50s", "0.02s", "0.01s"]);
        assert_eq!(lines[3], ["io", "1.52s", "1.50s", "0.02s", "-"]);
    }
}
