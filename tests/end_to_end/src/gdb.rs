//! The real gdb, and symbols for it.

use crate::{Guest, PATIENCE};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A gdb that carries out commands.
pub struct Debugger {
    child: Child,
    /// It lives as long as gdb.
    _script: tempfile::NamedTempFile,
    text: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Debugger {
    /// Starts gdb with `commands`.
    ///
    /// # Panics
    /// If there is none.
    pub fn start(commands: &[&str]) -> Self {
        let mut script = tempfile::NamedTempFile::new().expect("a temporary file");
        let settings = ["set pagination off", "set confirm off", "set width 0", "set remotetimeout 60"];
        for command in settings.iter().chain(commands) {
            writeln!(script, "{command}").expect("a temporary file");
        }
        // What a stub prints is among gdb's errors.
        let mut gdb = Command::new("sh");
        gdb.args(["-c", "exec gdb --nx --batch --command \"$0\" 2>&1"]).arg(script.path());
        gdb.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = gdb.spawn().expect("gdb starts");
        let mut output = child.stdout.take().expect("its output is piped");
        let text = Arc::new(Mutex::new(String::new()));
        let for_thread = text.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                for_thread.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Self { child, _script: script, text, reader: Some(reader) }
    }

    /// Everything that it has printed.
    pub fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    /// Waits until it has printed `expected`.
    ///
    /// # Panics
    /// If it does not.
    pub fn expect(&self, expected: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.text().contains(expected) {
            assert!(Instant::now() < end, "no {expected:?} from gdb, but:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types Ctrl-C.
    ///
    /// # Panics
    /// If it cannot be sent.
    pub fn interrupt(&self) {
        let kill = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
        assert!(kill.expect("kill starts").success());
    }

    /// Waits until it has carried out everything, and gives what it printed.
    ///
    /// # Panics
    /// If it takes too long.
    pub fn finish(mut self) -> String {
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("gdb can be waited for").is_none() {
            assert!(Instant::now() < end, "gdb does not end; it printed:\n{}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
        if let Some(reader) = self.reader.take() {
            reader.join().expect("what gdb prints is read");
        }
        self.text()
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Has gdb carry out `commands`, and gives what it printed.
///
/// # Panics
/// If there is no gdb, or it takes too long.
pub fn gdb(commands: &[&str]) -> String {
    Debugger::start(commands).finish()
}

/// A kernel's symbols.
pub struct Symbols(BTreeMap<String, u64>);

/// Takes the symbols `names` from a guest that runs, in whose shell root is.
///
/// # Panics
/// If one of them is missing.
pub fn symbols(guest: &mut Guest, names: &[&str]) -> Symbols {
    let mut found = BTreeMap::new();
    for name in names {
        assert_eq!(guest.shell(&format!("grep ' {name}$' /proc/kallsyms")), 0, "{name}");
        let text = guest.text();
        let line =
            text.lines().rev().find(|line| line.trim_end().ends_with(&format!(" {name}")) && line.len() > 19);
        let digits = line.and_then(|line| line.split_whitespace().next()).expect("a line of kallsyms");
        found.insert((*name).to_owned(), u64::from_str_radix(digits, 16).expect("an address"));
    }
    Symbols(found)
}

impl Symbols {
    /// The address of a symbol that was asked for.
    ///
    /// # Panics
    /// If it was not.
    pub fn address(&self, name: &str) -> u64 {
        self.0[name]
    }

    /// Writes an ELF file with these symbols into `folder`, for gdb.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn file(&self, folder: &Path) -> PathBuf {
        const HEADER: usize = 64;
        type Section = (u32, u32, u64, [u64; 3], [u32; 2], [u64; 2]);
        let mut strings = vec![0u8];
        // The empty symbol, then functions of section 1.
        let mut table = vec![0u8; 24];
        for (name, address) in &self.0 {
            table.extend((strings.len() as u32).to_le_bytes());
            table.extend([0x12, 0, 1, 0]);
            table.extend(address.to_le_bytes());
            table.extend(0u64.to_le_bytes());
            strings.extend(name.bytes());
            strings.push(0);
        }
        let names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0";
        let (table_at, strings_at) = (HEADER, HEADER + table.len());
        let names_at = strings_at + strings.len();
        let sections_at = (names_at + names.len()).next_multiple_of(8);
        let start = self.0.values().min().copied().unwrap_or(0) & !0xfff;
        let end = self.0.values().max().copied().unwrap_or(0) + 0x1000;
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [start, 0, sections_at as u64] {
            file.extend(word.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 0, 64, 5, 4] {
            file.extend(half.to_le_bytes());
        }
        file.extend(&table);
        file.extend(&strings);
        file.extend(names);
        file.resize(sections_at, 0);
        // Name, type, flags; address, offset, length; link, info; alignment, entry size.
        let sections: [Section; 5] = [
            (0, 0, 0, [0; 3], [0; 2], [0; 2]),
            (1, 8, 6, [start, 0, end - start], [0; 2], [16, 0]),
            (7, 2, 0, [0, table_at as u64, table.len() as u64], [3, 1], [8, 24]),
            (15, 3, 0, [0, strings_at as u64, strings.len() as u64], [0; 2], [1, 0]),
            (23, 3, 0, [0, names_at as u64, names.len() as u64], [0; 2], [1, 0]),
        ];
        for (name, kind, flags, place, links, sizes) in sections {
            file.extend(name.to_le_bytes());
            file.extend(kind.to_le_bytes());
            file.extend(flags.to_le_bytes());
            place.iter().for_each(|word| file.extend(word.to_le_bytes()));
            links.iter().for_each(|word| file.extend(word.to_le_bytes()));
            sizes.iter().for_each(|word| file.extend(word.to_le_bytes()));
        }
        let path = folder.join("kernel.elf");
        std::fs::write(&path, file).expect("the ELF file is written");
        path
    }
}
