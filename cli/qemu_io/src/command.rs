//! The commands: their names, how many words they take, and what help says of them.

use getopt::Flag;

/// A command.
#[derive(Debug)]
pub(crate) struct Command {
    /// Its name.
    pub(crate) name: &'static str,
    /// A shorter name.
    pub(crate) short: Option<&'static str>,
    /// The fewest words after its name.
    pub(crate) least: usize,
    /// The most, if there is a limit.
    pub(crate) most: Option<usize>,
    /// Whether an image must be open.
    pub(crate) needs_image: bool,
    /// Whether it writes.
    pub(crate) writes: bool,
    /// Its options.
    pub(crate) flags: &'static [Flag],
    /// Its words.
    pub(crate) usage: &'static str,
    /// What it does, in a line.
    pub(crate) about: &'static str,
}

impl Command {
    const fn new(name: &'static str, short: Option<&'static str>, about: &'static str) -> Self {
        Self {
            name,
            short,
            least: 0,
            most: Some(0),
            needs_image: true,
            writes: false,
            flags: &[],
            usage: "",
            about,
        }
    }

    const fn words(mut self, least: usize, most: Option<usize>, usage: &'static str) -> Self {
        self.least = least;
        self.most = most;
        self.usage = usage;
        self
    }

    const fn flags(mut self, flags: &'static [Flag]) -> Self {
        self.flags = flags;
        self
    }

    const fn writing(mut self) -> Self {
        self.writes = true;
        self
    }

    const fn without_image(mut self) -> Self {
        self.needs_image = false;
        self
    }

    /// The line that says how it is called.
    pub(crate) fn line(&self) -> String {
        self.line_as(self.name)
    }

    fn line_as(&self, name: &str) -> String {
        let usage = if self.usage.is_empty() { String::new() } else { format!("{} ", self.usage) };
        format!("{name} {usage}-- {}", self.about)
    }

    /// All that help says of it, called by `name`.
    pub(crate) fn help_as(&self, name: &str) -> String {
        let mut text = self.line_as(name);
        text.push('\n');
        if !self.flags.is_empty() {
            text.push('\n');
        }
        for flag in self.flags {
            let short = flag.short.unwrap_or_default();
            text.push_str(&format!(" -{short}, -- {}\n", flag.about));
        }
        text
    }
}

const STATISTICS: Flag = Flag::switch('C', "C", "statistics in one line, for programs");
const QUIET: Flag = Flag::switch('q', "q", "no statistics");
const REGISTERED: Flag = Flag::switch('r', "r", "I/O from a registered buffer (all of ours are alike)");
const VERBOSE: Flag = Flag::switch('v', "v", "print what was read");
const FUA: Flag = Flag::switch('f', "f", "on stable storage when the request ends");
const UNMAP: Flag = Flag::switch('u', "u", "with -z: the space may be given back");
const ZEROES: Flag = Flag::switch('z', "z", "make the range zero");
const CHECKED_PATTERN: Flag = Flag::valued('P', "P", "BYTE", "all bytes must be this one");
const PATTERN: Flag = Flag::valued('P', "P", "BYTE", "the byte to write instead of 0xcd");
const INVALID: Flag = Flag::switch('i', "i", "count an invalid request");
const VM_STATE: Flag = Flag::switch('b', "b", "the VM state instead of the disk");
const IGNORED: Flag = Flag::switch('p', "p", "ignored");

/// The commands, sorted by name.
pub(crate) static COMMANDS: &[Command] = &[
    Command::new("abort", None, "ends the program as a crash would").without_image(),
    Command::new("aio_flush", None, "waits for all requests in flight"),
    Command::new("aio_read", None, "begins to read bytes")
        .words(2, None, "[-Ciqrv] [-P pattern] off len [len..]")
        .flags(&[STATISTICS, INVALID, CHECKED_PATTERN, QUIET, REGISTERED, VERBOSE]),
    Command::new("aio_write", None, "begins to write bytes")
        .words(2, None, "[-Cfiqruz] [-P pattern] off len [len..]")
        .flags(&[STATISTICS, FUA, INVALID, PATTERN, QUIET, REGISTERED, UNMAP, ZEROES])
        .writing(),
    Command::new("alloc", Some("a"), "counts the allocated bytes of a range").words(
        1,
        Some(2),
        "offset [count]",
    ),
    Command::new("break", None, "stops requests that come to an event, as tag").words(
        2,
        Some(2),
        "event tag",
    ),
    Command::new("close", Some("c"), "closes the image"),
    Command::new("discard", Some("d"), "discards a range")
        .words(2, None, "[-Cq] off len")
        .flags(&[STATISTICS, QUIET])
        .writing(),
    Command::new("flush", Some("f"), "brings everything to stable storage"),
    Command::new("help", Some("?"), "says what commands there are, or all about one")
        .words(0, Some(1), "[command]")
        .without_image(),
    Command::new("info", Some("i"), "says what the image is"),
    Command::new("length", Some("l"), "says how long the image is"),
    Command::new("map", None, "lists what is allocated"),
    Command::new("open", Some("o"), "opens an image")
        .words(1, None, "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]")
        .flags(&[
            Flag::switch('r', "r", "only for reading"),
            Flag::switch('s', "s", "writes go to a temporary file"),
            Flag::switch('C', "C", "what is read of a backing file is copied"),
            Flag::switch('n', "n", "without the host's cache: -t none"),
            Flag::switch('U', "U", "share it with writers"),
            Flag::switch('k', "k", "the kernel's AIO"),
            Flag::valued('i', "i", "MODE", "threads, native or io_uring"),
            Flag::valued('t', "t", "MODE", "the cache mode"),
            Flag::valued('d', "d", "MODE", "what becomes of discards"),
            Flag::valued('o', "o", "OPTIONS", "options for the block driver"),
        ])
        .without_image(),
    Command::new("quit", Some("q"), "ends the program").words(0, None, "").without_image(),
    Command::new("read", Some("r"), "reads bytes")
        .words(2, None, "[-abCqrv] [-P pattern [-s off] [-l len]] off len")
        .flags(&[
            VM_STATE,
            STATISTICS,
            Flag::valued('l', "l", "LEN", "with -P: how many bytes are compared"),
            IGNORED,
            CHECKED_PATTERN,
            QUIET,
            REGISTERED,
            Flag::valued('s', "s", "OFF", "with -P: from which byte of those read"),
            VERBOSE,
        ]),
    Command::new("readv", None, "reads bytes into several buffers")
        .words(2, None, "[-Cqrv] [-P pattern] off len [len..]")
        .flags(&[STATISTICS, CHECKED_PATTERN, QUIET, REGISTERED, VERBOSE]),
    Command::new("remove_break", None, "takes a breakpoint away").words(1, Some(1), "tag"),
    Command::new("reopen", None, "changes how the image is open")
        .words(0, None, "[(-r|-w)] [-c cache] [-o options]")
        .flags(&[
            Flag::switch('r', "r", "only for reading"),
            Flag::switch('w', "w", "for writing"),
            Flag::valued('c', "c", "MODE", "the cache mode"),
            Flag::valued('o', "o", "OPTIONS", "options for the block driver"),
        ]),
    Command::new("resume", None, "lets a stopped request go on").words(1, Some(1), "tag"),
    Command::new("sigraise", None, "raises a signal").words(1, Some(1), "signal").without_image(),
    Command::new("sleep", None, "waits for so many milliseconds").words(1, Some(1), "").without_image(),
    Command::new("truncate", Some("t"), "makes the image so long")
        .words(1, Some(3), "[-m prealloc_mode] off")
        .flags(&[Flag::valued('m', "m", "MODE", "how what is new is allocated")])
        .writing(),
    Command::new("wait_break", None, "waits until a request is stopped").words(1, Some(1), "tag"),
    Command::new("write", Some("w"), "writes bytes")
        .words(2, None, "[-bcCfnqruz] [-P pattern | -s source_file] off len")
        .flags(&[
            VM_STATE,
            Flag::switch('c', "c", "compressed"),
            STATISTICS,
            FUA,
            Flag::switch('n', "n", "with -z: not by writing zeroes"),
            IGNORED,
            PATTERN,
            QUIET,
            REGISTERED,
            Flag::valued('s', "s", "FILE", "write what is in a file, again and again"),
            UNMAP,
            ZEROES,
        ])
        .writing(),
    Command::new("writev", None, "writes bytes from several buffers")
        .words(2, None, "[-Cfqr] [-P pattern] off len [len..]")
        .flags(&[STATISTICS, FUA, PATTERN, QUIET, REGISTERED])
        .writing(),
];

/// The command of that name.
pub(crate) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name || command.short == Some(name))
}

#[cfg(test)]
mod tests {
    use super::{COMMANDS, find};

    #[test]
    fn names_are_found() {
        assert!(COMMANDS.is_sorted_by_key(|command| command.name));
        assert_eq!(find("r").map(|command| command.name), Some("read"));
        assert!(find("rea").is_none());
    }

    #[test]
    fn options_are_not_given_twice() {
        for command in COMMANDS {
            for (index, flag) in command.flags.iter().enumerate() {
                assert!(
                    !command.flags[..index].iter().any(|other| other.short == flag.short),
                    "{}",
                    command.name
                );
            }
        }
    }
}
