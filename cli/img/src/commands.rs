//! The subcommands: their words, and one table of options for each.

use getopt::Flag;

/// A subcommand.
pub(crate) struct Subcommand {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it does, in a line.
    pub(crate) about: &'static str,
    /// Its words, after its name.
    pub(crate) usage: &'static str,
    /// Its options.
    pub(crate) flags: &'static [Flag],
}

const HELP: Flag = Flag::switch('h', "help", "Show help").or("help");
const OBJECT: Flag = Flag::long_valued("object", "OBJECT", "Define a secret: secret,id=NAME,file=FILE");
const IMAGE_OPTS: Flag =
    Flag::long_switch("image-opts", "File names are lists of options: driver=qcow2,file.filename=x");
const FORMAT: Flag = Flag::valued('f', "f", "FMT", "The image's format, which is else found out");
const LONG_FORMAT: Flag = FORMAT.or("format");
const FORCE_SHARE: Flag = Flag::switch('U', "U", "Open it even if others write to it").or("force-share");
const OUTPUT: Flag = Flag::long_valued("output", "HOW", "human or json");
const QUIET: Flag = Flag::switch('q', "q", "Print nothing but errors");
const PROGRESS: Flag = Flag::switch('p', "p", "Show how far it is");
const CACHE: Flag = Flag::valued('t', "t", "MODE", "The cache mode for what is written");
const SOURCE_CACHE: Flag = Flag::valued('T', "T", "MODE", "The cache mode for what is read");
const OPTIONS: Flag = Flag::valued('o', "o", "OPTIONS", "The format's options; -o help lists them");
const OUTPUT_FORMAT: Flag = Flag::valued('O', "O", "FMT", "The new image's format");
const BACKING_FORMAT: Flag = Flag::valued('F', "F", "FMT", "The backing file's format");
const SNAPSHOT: Flag = Flag::valued('l', "l", "SNAPSHOT", "Read this internal snapshot");
const RATE: Flag = Flag::valued('r', "r", "RATE", "Write at most so many bytes a second");

/// All of them, by name.
pub(crate) static SUBCOMMANDS: &[Subcommand] = &[
    Subcommand {
        name: "amend",
        about: "Changes an image's format options",
        usage: "[--object OBJECT] [--image-opts] [-p] [-q] [-f FMT] [-t CACHE] [--force] -o OPTIONS FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            Flag::long_switch("force", "Do also what may lose access to the image"),
            OPTIONS,
            FORMAT,
            CACHE,
            PROGRESS,
            QUIET,
        ],
    },
    Subcommand {
        name: "bench",
        about: "Measures how fast requests are",
        usage: "[-c COUNT] [-d DEPTH] [-f FMT] [--flush-interval=COUNT] [-i AIO] [-n] [--no-drain] [-o OFFSET] \
                [--pattern=BYTE] [-q] [-s SIZE] [-S STEP] [-t CACHE] [-w] [-U] FILE",
        flags: &[
            HELP,
            IMAGE_OPTS,
            FORMAT,
            FORCE_SHARE,
            CACHE,
            QUIET,
            Flag::valued('c', "c", "COUNT", "How many requests [75000]"),
            Flag::valued('d', "d", "DEPTH", "How many at once [64]"),
            Flag::long_valued("flush-interval", "COUNT", "A flush after so many writes"),
            Flag::valued('i', "i", "AIO", "threads, native or io_uring"),
            Flag::switch('n', "n", "The kernel's AIO"),
            Flag::long_switch("no-drain", "Do not wait for requests before a flush"),
            Flag::valued('o', "o", "OFFSET", "Where to begin"),
            Flag::long_valued("pattern", "BYTE", "What to write"),
            Flag::valued('s', "s", "SIZE", "A request's size [4k]"),
            Flag::valued('S', "S", "STEP", "From one request's offset to the next's [its size]"),
            Flag::switch('w', "w", "Write; else read"),
        ],
    },
    Subcommand {
        name: "bitmap",
        about: "Changes an image's dirty bitmaps",
        usage: "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b FILE [-F FMT]] \
                [-g GRANULARITY] [--object OBJECT] [--image-opts | -f FMT] FILE BITMAP",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORMAT,
            Flag::long_switch("add", "Make a bitmap"),
            Flag::long_switch("remove", "Remove it"),
            Flag::long_switch("clear", "Make it empty"),
            Flag::long_switch("enable", "Let it take up writes"),
            Flag::long_switch("disable", "Let it take up no more writes"),
            Flag::long_valued("merge", "SOURCE", "Add what another bitmap has"),
            Flag::valued('g', "g", "GRANULARITY", "With --add: the bytes of a bit").or("granularity"),
            Flag::valued('b', "b", "FILE", "With --merge: the image that the other bitmap is in")
                .or("source-file"),
            Flag::valued('F', "F", "FMT", "That image's format").or("source-format"),
        ],
    },
    Subcommand {
        name: "check",
        about: "Looks for errors in an image, and repairs them",
        usage: "[--object OBJECT] [--image-opts] [-q] [-f FMT] [--output=HOW] [-r [leaks | all]] [-T CACHE] [-U] FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            LONG_FORMAT,
            FORCE_SHARE,
            OUTPUT,
            QUIET,
            SOURCE_CACHE,
            Flag::valued('r', "r", "WHAT", "Repair leaks, or all").or("repair"),
        ],
    },
    Subcommand {
        name: "commit",
        about: "Writes what an image has to its backing file",
        usage: "[--object OBJECT] [--image-opts] [-q] [-f FMT] [-t CACHE] [-b BASE] [-r RATE] [-d] [-p] FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORMAT,
            CACHE,
            Flag::valued('b', "b", "BASE", "The image of the chain to write to"),
            Flag::switch('d', "d", "Do not empty the image afterwards"),
            PROGRESS,
            QUIET,
            RATE,
        ],
    },
    Subcommand {
        name: "compare",
        about: "Compares what two images contain",
        usage: "[--object OBJECT] [--image-opts] [-f FMT] [-F FMT] [-T CACHE] [-p] [-q] [-s] [-U] FILE FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORMAT,
            Flag::valued('F', "F", "FMT", "The second image's format"),
            SOURCE_CACHE,
            PROGRESS,
            QUIET,
            Flag::switch('s', "s", "Sizes and what is allocated must be the same too"),
            FORCE_SHARE,
        ],
    },
    Subcommand {
        name: "convert",
        about: "Copies images to one of another format",
        usage: "[--object OBJECT] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps] [-U] [-C] [-c] \
                [-p] [-q] [-n] [-f FMT] [-t CACHE] [-T CACHE] [-O FMT] [-B FILE [-F FMT]] [-o OPTIONS] [-l SNAPSHOT] \
                [-S SIZE] [-r RATE] [-m COUNT] [-W] [--salvage] FILE [FILE...] FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            FORMAT,
            OUTPUT_FORMAT,
            OPTIONS,
            SNAPSHOT,
            CACHE,
            SOURCE_CACHE,
            PROGRESS,
            QUIET,
            RATE,
            BACKING_FORMAT,
            Flag::long_switch("target-image-opts", "The target's name is a list of options; with -n"),
            Flag::long_switch("target-is-zero", "The target reads as zeroes; with -n"),
            Flag::long_switch("salvage", "Take what cannot be read for zeroes"),
            Flag::long_switch("bitmaps", "Copy dirty bitmaps too"),
            Flag::long_switch("skip-broken-bitmaps", "But those that are inconsistent"),
            Flag::valued('B', "B", "FILE", "The new image's backing file"),
            Flag::switch('C', "C", "Let the host copy, where it can"),
            Flag::switch('c', "c", "Compress"),
            Flag::valued('S', "S", "SIZE", "So many zero bytes in a row become a hole [4k]; 0: none do"),
            Flag::switch('n', "n", "The target is there already"),
            Flag::valued('m', "m", "COUNT", "How many requests at once [8]"),
            Flag::switch('W', "W", "Writes may come in any order"),
        ],
    },
    Subcommand {
        name: "create",
        about: "Makes an image",
        usage: "[--object OBJECT] [-q] [-f FMT] [-b FILE [-F FMT]] [-u] [-o OPTIONS] FILE [SIZE]",
        flags: &[
            HELP,
            OBJECT,
            BACKING_FORMAT,
            Flag::valued('b', "b", "FILE", "The backing file"),
            FORMAT,
            OPTIONS,
            QUIET,
            Flag::switch('u', "u", "Do not look at the backing file"),
        ],
    },
    Subcommand {
        name: "dd",
        about: "Copies blocks from one image to another",
        usage: "[--image-opts] [-U] [-f FMT] [-O FMT] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=FILE of=FILE",
        flags: &[HELP, OBJECT, IMAGE_OPTS, FORCE_SHARE, FORMAT, OUTPUT_FORMAT],
    },
    Subcommand {
        name: "info",
        about: "Says what an image is",
        usage: "[--object OBJECT] [--image-opts] [-f FMT] [--output=HOW] [--backing-chain] [-U] FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            LONG_FORMAT,
            FORCE_SHARE,
            OUTPUT,
            Flag::long_switch("backing-chain", "And what its backing files are"),
        ],
    },
    Subcommand {
        name: "map",
        about: "Says where an image's data are",
        usage: "[--object OBJECT] [--image-opts] [-f FMT] [--start-offset=OFFSET] [--max-length=LEN] [--output=HOW] \
                [-U] FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            LONG_FORMAT,
            FORCE_SHARE,
            OUTPUT,
            Flag::valued('s', "s", "OFFSET", "Where to begin").or("start-offset"),
            Flag::valued('l', "l", "LEN", "How far to go").or("max-length"),
        ],
    },
    Subcommand {
        name: "measure",
        about: "Says how large a new image's file will be",
        usage: "[--output=HOW] [-O FMT] [-o OPTIONS] [--size N | [--object OBJECT] [--image-opts] [-f FMT] \
                [-l SNAPSHOT] FILE]",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORMAT,
            FORCE_SHARE,
            OUTPUT,
            OUTPUT_FORMAT,
            OPTIONS,
            SNAPSHOT,
            Flag::long_valued("size", "SIZE", "The new image's size"),
        ],
    },
    Subcommand {
        name: "rebase",
        about: "Changes an image's backing file",
        usage: "[--object OBJECT] [--image-opts] [-U] [-q] [-f FMT] [-t CACHE] [-T CACHE] [-p] [-u] [-c] -b FILE \
                [-F FMT] FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            FORMAT,
            CACHE,
            SOURCE_CACHE,
            PROGRESS,
            QUIET,
            BACKING_FORMAT,
            Flag::valued('b', "b", "FILE", "The new backing file; an empty name for none"),
            Flag::switch('u', "u", "Only the name: the old and the new file have the same content"),
            Flag::switch('c', "c", "Compress what is copied").or("compress"),
        ],
    },
    Subcommand {
        name: "resize",
        about: "Changes an image's size",
        usage: "[--object OBJECT] [--image-opts] [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILE [+ | -]SIZE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORMAT,
            QUIET,
            Flag::long_valued(
                "preallocation",
                "MODE",
                "How what is new is allocated: off, metadata, falloc or full",
            ),
            Flag::long_switch("shrink", "It may become smaller, and lose what is beyond its end"),
        ],
    },
    Subcommand {
        name: "snapshot",
        about: "Lists, makes, goes back to, or deletes internal snapshots",
        usage: "[--object OBJECT] [--image-opts] [-U] [-q] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILE",
        flags: &[
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            QUIET,
            Flag::switch('l', "l", "List them"),
            Flag::valued('a', "a", "SNAPSHOT", "Go back to it"),
            Flag::valued('c', "c", "SNAPSHOT", "Make it"),
            Flag::valued('d', "d", "SNAPSHOT", "Delete it"),
        ],
    },
];

/// The options of the subcommand `name`.
pub(crate) fn flags(name: &str) -> &'static [Flag] {
    SUBCOMMANDS.iter().find(|command| command.name == name).map_or(&[], |command| command.flags)
}
