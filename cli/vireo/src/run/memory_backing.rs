//! `--memory-backing KEY=VALUE,…`

use super::size;
use super::words::{split, switch};
use guest_memory::{Lock, MemoryOptions, MemorySource};

/// What `--memory-backing` takes.
const ACCEPTED: &str = "file=PATH, hugepages=SIZE, shared=on|off, prealloc=on|off, prealloc-threads=N, \
                        lock=on|on-fault|off, thp=on|off, ksm=on|off, dump=on|off";

/// Reads what guest memory is to be made of. A comma in a value is written twice.
pub(crate) fn parse(text: &str) -> Result<MemoryOptions, String> {
    let mut options = MemoryOptions::default();
    let mut shared = None;
    for word in split(text) {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("{word:?} is no option of guest memory; accepted are {ACCEPTED}"));
        };
        let wrong = |accepted: &str| Err(format!("{key}={value} is not possible; accepted is {accepted}"));
        let twice = options.source != MemorySource::Anonymous;
        match key {
            "file" | "hugepages" if twice => {
                return Err("memory comes from one file, or from huge pages of one size".into());
            }
            "file" if value.is_empty() => return wrong("a path"),
            "file" => options.source = MemorySource::File(value.into()),
            "hugepages" => match size::parse(value, 1) {
                Ok(size) if size.is_power_of_two() && size >= 4096 => {
                    options.source = MemorySource::HugePages(size);
                }
                _ => return wrong("a size of huge pages, such as 2M or 1G"),
            },
            "shared" | "share" => shared = Some(switch(key, value)?),
            "prealloc" => options.prealloc = switch(key, value)?,
            "prealloc-threads" => match value.parse() {
                Ok(threads @ 1..=1024) => options.prealloc_threads = Some(threads),
                _ => return wrong("a number from 1 to 1024"),
            },
            "lock" => match value {
                "on-fault" => options.lock = Lock::OnFault,
                _ => match switch(key, value) {
                    Ok(true) => options.lock = Lock::On,
                    Ok(false) => options.lock = Lock::Off,
                    Err(_) => return wrong("on, on-fault or off"),
                },
            },
            "thp" => options.transparent_huge = Some(switch(key, value)?),
            "ksm" | "merge" => options.merge = switch(key, value)?,
            "dump" => options.dump = switch(key, value)?,
            _ => return Err(format!("{key:?} is no option of guest memory; accepted are {ACCEPTED}")),
        }
    }
    // A file is named so that something of the guest stays or others see it.
    options.shared = shared.unwrap_or(matches!(options.source, MemorySource::File(_)));
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backings_people_write() {
        assert_eq!(
            parse("thp=on,ksm=on,dump=off").unwrap(),
            MemoryOptions {
                transparent_huge: Some(true),
                merge: true,
                dump: false,
                ..MemoryOptions::default()
            }
        );
        assert_eq!(
            parse("hugepages=1G,prealloc=on,prealloc-threads=4,lock=on").unwrap(),
            MemoryOptions {
                source: MemorySource::HugePages(1 << 30),
                prealloc: true,
                prealloc_threads: Some(4),
                lock: Lock::On,
                ..MemoryOptions::default()
            }
        );
        let file = parse("file=/dev/shm/a,,b").unwrap();
        assert_eq!((file.source, file.shared), (MemorySource::File("/dev/shm/a,b".into()), true));
        assert!(!parse("file=a,shared=off").unwrap().shared && parse("shared=on").unwrap().shared);
        for text in [
            "x",
            "x=y",
            "file=",
            "file=a,hugepages=2M",
            "hugepages=3M",
            "hugepages=big",
            "prealloc=maybe",
            "prealloc-threads=0",
            "lock=maybe",
            "thp=always",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
