//! `vireo io`, which is also `qemu-io`: sends single requests to disk images, for tests.
//!
//! Commands, options and outputs are qemu-io's, so that tests written for it run unchanged.

mod command;
mod format;
mod image;
mod output;
mod requests;
mod session;
mod words;

use block_filters::Blkdebug;
use block_graph::{AllowAll, Errno, NodeRef, OpenContext, Options, Role, Secrets};
use command::{COMMANDS, Command, find};
use getopt::{Flag, Getopt, Word};
use output::line;
use session::{Opening, Session};
use std::io::{BufRead, BufReader, Stdin};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use words::{Failed, Words, number};

const FLAGS: &[Flag] = &[
    Flag::switch('h', "help", "Show help").or("help"),
    Flag::switch('V', "V", "Show the version").or("version"),
    Flag::valued('c', "c", "COMMAND", "Run this command; several run one after the other").or("cmd"),
    Flag::valued('f', "f", "FMT", "The image's format, which is else found out").or("format"),
    Flag::switch('r', "r", "Open it only for reading").or("read-only"),
    Flag::switch('s', "s", "Writes go to a temporary file").or("snapshot"),
    Flag::switch('n', "n", "Without the host's cache: -t none").or("nocache"),
    Flag::switch('C', "C", "What is read of a backing file is copied").or("copy-on-read"),
    Flag::switch('m', "m", "Use buffers that are not aligned").or("misalign"),
    Flag::switch('k', "k", "The kernel's AIO: -i native").or("native-aio"),
    Flag::valued('i', "i", "MODE", "threads, native or io_uring").or("aio"),
    Flag::valued('d', "d", "MODE", "What becomes of discards: ignore or unmap").or("discard"),
    Flag::valued('t', "t", "MODE", "The cache mode").or("cache"),
    Flag::valued('T', "T", "PATTERN", "Ignored: there is no tracing").or("trace"),
    Flag::long_valued("object", "OBJECT", "Define a secret: secret,id=NAME,file=FILE"),
    Flag::long_switch("image-opts", "The image's name is a list of options"),
    Flag::switch('U', "U", "Open it even if others write to it").or("force-share"),
];

/// What the command is, for shells to complete.
pub fn completion() -> clap::Command {
    getopt::completion("io", "Sends single requests to disk images, for tests.", FLAGS)
}

/// What the command line says.
struct Arguments {
    opening: Opening,
    format: Option<String>,
    commands: Vec<String>,
    image_opts: bool,
    misaligned: bool,
    secrets: Secrets,
    file: Option<String>,
}

/// Runs the program that was called as `program` with `arguments`.
pub fn run(program: &str, arguments: Vec<String>) -> ExitCode {
    let name = program.rsplit('/').next().unwrap_or(program);
    match parse(name, arguments) {
        Ok(arguments) => io_loop::block_on(serve(name, arguments)),
        Err(code) => code,
    }
}

fn parse(name: &str, arguments: Vec<String>) -> Result<Arguments, ExitCode> {
    let mut parsed = Arguments {
        opening: Opening::new(),
        format: None,
        commands: Vec::new(),
        image_opts: false,
        misaligned: false,
        secrets: Secrets::default(),
        file: None,
    };
    let say = |message: String| {
        eprintln!("{name}: {message}");
        ExitCode::FAILURE
    };
    let misused = |message: String| {
        say(message);
        print_help(name);
        ExitCode::FAILURE
    };
    for word in Getopt::new(FLAGS, arguments) {
        match word {
            Word::Option("help", _) => {
                print_help(name);
                return Err(ExitCode::SUCCESS);
            }
            Word::Option("V", _) => {
                println!("{name} version {}", env!("CARGO_PKG_VERSION"));
                return Err(ExitCode::SUCCESS);
            }
            Word::Option("c", command) => parsed.commands.push(command),
            Word::Option("f", format) => parsed.format = Some(format),
            Word::Option("m", _) => parsed.misaligned = true,
            Word::Option("image-opts", _) => parsed.image_opts = true,
            Word::Option("object", object) => {
                let added = blockdev::secret::add_object(&mut parsed.secrets, &object);
                added.map_err(|error| say(error.to_string()))?;
            }
            // What remains is the tracing, or concerns the image.
            Word::Option(key, value) => {
                parsed.opening.take(key, &value).map_err(say)?;
            }
            Word::Operand(file) if parsed.file.is_none() => parsed.file = Some(file),
            Word::Operand(file) => return Err(misused(format!("'{file}' is one image too many"))),
            Word::MissingValue(word) => {
                return Err(misused(format!("option '{word}' requires an argument")));
            }
            Word::Unknown(_, says) => return Err(misused(says)),
        }
    }
    if parsed.format.is_some() && parsed.image_opts {
        return Err(say("--image-opts and -f are mutually exclusive".to_owned()));
    }
    Ok(parsed)
}

async fn serve(name: &str, arguments: Arguments) -> ExitCode {
    let Arguments { mut opening, format, commands, image_opts, misaligned, secrets, file } = arguments;
    let context = OpenContext::new(Arc::new(blockdev::registry()), Arc::new(secrets), Arc::new(AllowAll));
    let mut session = Session::new(name, context);
    session.image_opts = image_opts;
    session.misaligned = misaligned;
    if let Some(file) = file {
        if image_opts {
            opening.options = session.listed(&file);
        } else {
            opening.options = format.map(|format| Options::with("driver", format)).unwrap_or_default();
            opening.name = Some(file);
        }
        if session.open(opening).await.is_err() {
            return ExitCode::FAILURE;
        }
    }
    let mut failed = false;
    if commands.is_empty() {
        failed = interact(&mut session).await;
    } else {
        for command in &commands {
            match execute(&mut session, command).await {
                Ok(Next::Quit) => break,
                result => failed |= result.is_err(),
            }
        }
    }
    close(&mut session).await;
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Closes the image. What could not be written then is said and decides no exit code; a bare number is what requests
/// have met and said before.
async fn close(session: &mut Session) {
    match session.close().await {
        Err(error) if error.to_string() != error.errno().to_string() => session.error(error),
        _ => {}
    }
}

/// Runs the commands that come in; returns whether one failed.
async fn interact(session: &mut Session) -> bool {
    let mut failed = false;
    let input = Arc::new(Mutex::new(BufReader::new(std::io::stdin())));
    let next_line = |input: &Mutex<BufReader<Stdin>>| {
        let mut text = String::new();
        let read = input.lock().unwrap_or_else(PoisonError::into_inner).read_line(&mut text);
        read.ok().filter(|bytes| *bytes > 0).map(|_| text)
    };
    loop {
        output::text(&format!("{}> ", session.program));
        output::flush();
        let is_there = input.lock().unwrap_or_else(PoisonError::into_inner).buffer().contains(&b'\n');
        let line = if is_there {
            next_line(&input)
        } else {
            // Requests in flight go on meanwhile.
            let input = input.clone();
            io_loop::blocking(move || next_line(&input)).await
        };
        let Some(text) = line else { return failed };
        match execute(session, text.trim_end_matches('\n')).await {
            Ok(Next::Quit) => return failed,
            result => failed |= result.is_err(),
        }
    }
}

/// What comes after a command.
enum Next {
    Command,
    Quit,
}

async fn execute(session: &mut Session, text: &str) -> Result<Next, Failed> {
    let mut words: Vec<String> = text.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    if words.is_empty() {
        return Ok(Next::Command);
    }
    let name = words.remove(0);
    let fail = |message: String| {
        output::flush();
        eprintln!("{message}");
        Failed
    };
    let command = find(&name).ok_or_else(|| fail(format!("command \"{name}\" not found")))?;
    if command.needs_image && session.node().is_none() {
        return Err(fail("no file open, try 'help open'".to_owned()));
    }
    let (count, least) = (words.len(), command.least);
    if count < least || command.most.is_some_and(|most| count > most) {
        let expected = match command.most {
            None => format!("at least {least}"),
            Some(most) if most == least => format!("{least}"),
            Some(most) => format!("between {least} and {most}"),
        };
        return Err(fail(format!("bad argument count {count} to {name}, expected {expected} arguments")));
    }
    if command.name == "quit" {
        return Ok(Next::Quit);
    }
    let words = Words::parse(&session.program, command, words)?;
    match (command.needs_image, session.node().cloned()) {
        (true, Some(node)) => with_image(session, &node, command, &words).await?,
        _ => without_image(session, command, &words).await?,
    }
    Ok(Next::Command)
}

async fn with_image(
    session: &mut Session,
    node: &NodeRef,
    command: &Command,
    words: &Words,
) -> Result<(), Failed> {
    if command.writes && node.read_only() {
        session.error("Block node is read-only");
        return Err(Failed);
    }
    match command.name {
        "read" => requests::read(session, node, words).await,
        "readv" => requests::readv(session, node, words).await,
        "write" => requests::write(session, node, words).await,
        "writev" => requests::writev(session, node, words).await,
        "aio_read" | "aio_write" => {
            match command.name {
                "aio_read" => requests::aio_read(session, node, words)?,
                _ => requests::aio_write(session, node, words)?,
            }
            // It begins before the next command does.
            io_loop::yield_now().await;
            Ok(())
        }
        "aio_flush" => {
            session.wait_for_requests().await;
            Ok(())
        }
        "flush" => node.flush().await.map_err(|_| Failed),
        "discard" => requests::discard(node, words).await,
        "alloc" => image::alloc(node, words).await,
        "map" => image::map(session, node).await,
        "truncate" => image::truncate(session, node, words).await,
        "reopen" => image::reopen(session, node, words).await,
        "length" => {
            image::length(node);
            Ok(())
        }
        "info" => image::info(node),
        "close" => {
            close(session).await;
            Ok(())
        }
        _ => breakpoints(node, command, words).await,
    }
}

/// The commands about points of a driver's work.
async fn breakpoints(node: &NodeRef, command: &Command, words: &Words) -> Result<(), Failed> {
    let tag = words.rest().last().map(String::as_str).unwrap_or_default();
    let fail = |what: String, errno: Errno| {
        line(format_args!("Could not {what}: {errno}"));
        Err(Failed)
    };
    let failure = match command.name {
        "break" => "set breakpoint".to_owned(),
        "remove_break" => format!("remove breakpoint {tag}"),
        "resume" => "resume request".to_owned(),
        _ => "wait for a request".to_owned(),
    };
    // The filter stands somewhere between the format and the file.
    let mut below = Some(node.clone());
    while let Some(node) = below.take_if(|node| Blkdebug::of(node).is_none()) {
        below = node.child(Role::File).or_else(|| node.child(Role::Filtered));
    }
    let Some(filter) = below else { return fail(failure, Errno::NOT_SUPPORTED) };
    let Some(debug) = Blkdebug::of(&filter) else { return fail(failure, Errno::NOT_SUPPORTED) };
    let done = match command.name {
        "break" => debug.set_breakpoint(&words.rest()[0], tag),
        "remove_break" => debug.remove_breakpoint(tag),
        "resume" => {
            let resumed = debug.resume(tag);
            // The request goes on before the next command does.
            io_loop::yield_now().await;
            resumed
        }
        _ => {
            while !debug.is_suspended(tag) {
                io_loop::sleep(std::time::Duration::from_millis(1)).await;
            }
            true
        }
    };
    match (done, command.name) {
        (true, _) => Ok(()),
        (false, "break") => fail(failure, Errno::INVALID),
        (false, _) => fail(failure, Errno::NOT_FOUND),
    }
}

async fn without_image(session: &mut Session, command: &Command, words: &Words) -> Result<(), Failed> {
    match command.name {
        "open" => open(session, words).await,
        "help" => help(words),
        "sleep" => {
            let [text] = words.exactly()?;
            let Ok(milliseconds) = text.parse() else {
                line(format_args!("{text} is not a valid number"));
                return Err(Failed);
            };
            io_loop::sleep(std::time::Duration::from_millis(milliseconds)).await;
            Ok(())
        }
        "sigraise" => {
            let [text] = words.exactly()?;
            let signal = i32::try_from(number(text)?).ok().and_then(rustix::process::Signal::from_named_raw);
            let Some(signal) = signal else {
                line(format_args!("signal argument '{text}' is too large to be a valid signal"));
                return Err(Failed);
            };
            output::flush();
            let raised = rustix::process::kill_process(rustix::process::getpid(), signal);
            raised.map_err(|_| Failed)
        }
        _ => {
            output::flush();
            std::process::abort()
        }
    }
}

async fn open(session: &mut Session, words: &Words) -> Result<(), Failed> {
    let mut opening = Opening::new();
    for key in ["r", "s", "C", "n", "U", "k", "i", "t", "d"] {
        if words.has(key)
            && let Err(message) = opening.take(key, words.value(key).unwrap_or_default())
        {
            session.error(message);
            return Err(Failed);
        }
    }
    if let Some(list) = words.value("o") {
        if session.image_opts {
            line("--image-opts and 'open -o' are mutually exclusive");
            return Err(Failed);
        }
        opening.options = session.listed(list);
    }
    match words.rest() {
        [] => {}
        [list] if session.image_opts => opening.options = session.listed(list),
        [name] => opening.name = Some(name.clone()),
        _ => return Err(words.usage()),
    }
    session.open(opening).await.map_err(|()| Failed)
}

fn help(words: &Words) -> Result<(), Failed> {
    match words.rest() {
        [] => {
            COMMANDS.iter().for_each(|command| line(command.line()));
            line("\nUse 'help commandname' for extended help.");
            Ok(())
        }
        [name, ..] => match find(name) {
            Some(command) => {
                output::text(&command.help_as(name));
                Ok(())
            }
            None => {
                line(format_args!("command {name} not found"));
                Err(Failed)
            }
        },
    }
}

fn print_help(name: &str) {
    println!(
        "Sends single requests to a disk image, for tests.\n\nUsage: {name} [OPTIONS] [-c COMMAND]... [FILE]\n"
    );
    for flag in FLAGS {
        let short = flag.short.map(|short| format!("-{short}"));
        let long = flag.long.map(|long| format!("--{long}"));
        let mut names: Vec<String> = short.into_iter().chain(long).collect();
        if let (Some(value), Some(last)) = (flag.value, names.last_mut()) {
            last.push_str(&format!(" {value}"));
        }
        println!("  {:<28} {}", names.join(", "), flag.about);
    }
    println!(
        "\nExamples:\n  {name} -c 'write -P 1 0 64k' -c map disk.qcow2\n  {name} -r -c 'read -v 0 512' disk.raw\n  \
         {name} -c help"
    );
}

#[cfg(test)]
mod tests {
    #[test]
    fn completion_is_consistent() {
        super::completion().debug_assert();
    }
}
