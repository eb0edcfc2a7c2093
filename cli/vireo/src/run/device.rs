//! `--device NAME,KEY=VALUE,…`, and `--debug-exit`

use super::words::{number, split};
use chardev::ChardevSpec;
use machine::DeviceSpec;

/// What `--device` takes.
const ACCEPTED: &str = "isa-debug-exit[,iobase=PORT][,iosize=N], isa-debugcon[,iobase=PORT][,chardev=WHERE], \
                        pc-testdev";

const PORTS: &str = "ports from 0 to 0xffff";

/// Reads the port of a debug-exit device, which takes writes of up to 32 bits.
pub(crate) fn parse_debug_exit(text: &str) -> Result<DeviceSpec, String> {
    let port = number(text).ok_or_else(|| format!("accepted are {PORTS}"))?;
    Ok(DeviceSpec::DebugExit { port, count: 4 })
}

/// Reads a device's name and options. A comma in a value is written twice.
pub(crate) fn parse(text: &str) -> Result<DeviceSpec, String> {
    let words = split(text);
    let Some((name, options)) = words.split_first() else {
        return Err(format!("a device needs a name; accepted are {ACCEPTED}"));
    };
    let mut device = match name.as_str() {
        "isa-debug-exit" => DeviceSpec::DebugExit { port: 0x501, count: 2 },
        "isa-debugcon" => DeviceSpec::DebugConsole { port: 0xe9, output: ChardevSpec::Stdio },
        "pc-testdev" => DeviceSpec::PcTestdev,
        _ => return Err(format!("{name:?} is no device; accepted are {ACCEPTED}")),
    };
    for word in options {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        let wrong = |accepted: &str| format!("{key}={value} is not possible; accepted are {accepted}");
        match (&mut device, key) {
            (DeviceSpec::DebugExit { port, .. } | DeviceSpec::DebugConsole { port, .. }, "iobase") => {
                *port = number(value).ok_or_else(|| wrong(PORTS))?;
            }
            (DeviceSpec::DebugExit { count, .. }, "iosize") => {
                *count = number(value)
                    .filter(|count| (1..=4).contains(count))
                    .ok_or_else(|| wrong("numbers from 1 to 4"))?;
            }
            (DeviceSpec::DebugConsole { output, .. }, "chardev") => {
                *output = value.parse().map_err(|error: chardev::ChardevSpecError| error.to_string())?;
            }
            _ => return Err(format!("{key:?} is no option of {name}; accepted are {ACCEPTED}")),
        }
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_people_write() {
        assert_eq!(parse("pc-testdev"), Ok(DeviceSpec::PcTestdev));
        let exit = |port, count| Ok(DeviceSpec::DebugExit { port, count });
        assert_eq!(parse("isa-debug-exit"), exit(0x501, 2));
        assert_eq!(parse("isa-debug-exit,iobase=0xf4,iosize=4"), exit(0xf4, 4));
        let output = ChardevSpec::File("a,b".into());
        let console = DeviceSpec::DebugConsole { port: 0x402, output };
        assert_eq!(parse("isa-debugcon,iobase=1026,chardev=file=a,,b"), Ok(console));
        for text in [
            "",
            "isa",
            "pc-testdev,iobase=1",
            "isa-debug-exit,iosize=0",
            "isa-debug-exit,iobase=70000",
            "isa-debugcon,chardev=x",
            "isa-debugcon,iosize=4",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
