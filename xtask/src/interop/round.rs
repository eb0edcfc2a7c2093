//! One image's way between two sides.

use super::combination::{Backing, Combination, Data};
use super::content::{self, SIZE, Write};
use super::tools::Tools;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::Path;

const SECRET: &str = "secret,id=key,data=of interest to nobody";

/// A folder with an image and what belongs to it.
struct Round<'a> {
    folder: &'a Path,
    combination: &'a Combination,
    /// What the disk holds.
    content: Vec<u8>,
}

/// Has `writer` make and fill an image, `reader` check, read and write it, and `writer` check and read it again.
///
/// # Errors
/// What one of them refused, found at fault or read wrong.
pub(crate) fn run(folder: &Path, combination: &Combination, writer: &Tools, reader: &Tools) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).context("clearing the folder")?;
    }
    fs::create_dir(folder).context("making a folder")?;
    let mut round = Round { folder, combination, content: vec![0; SIZE] };
    round.create(writer)?;
    round.write(writer, &content::first(combination.cluster as usize, combination.compressed_clusters()))?;
    let kept = round.content.clone();
    if combination.has_snapshots() {
        round.snapshot(writer, "-c")?;
    }
    round.write(writer, &content::second())?;

    round.check(reader)?;
    round.compare(reader, &[], &round.content)?;
    if combination.has_snapshots() {
        round.compare(reader, &["-l", "snapshot.name=kept"], &kept)?;
    }
    round.write(reader, &content::third())?;

    round.check(writer)?;
    round.compare(writer, &[], &round.content)?;
    if combination.data == Data::RawFile {
        let data = fs::read(folder.join("data")).context("reading the data file")?;
        if data != round.content {
            bail!("the data file is not the disk");
        }
    }
    if combination.has_snapshots() {
        round.snapshot(reader, "-a")?;
        round.compare(writer, &[], &kept)?;
        round.snapshot(writer, "-d")?;
        round.check(reader)?;
    }
    Ok(())
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

impl Round<'_> {
    fn secret(&self) -> Vec<String> {
        if self.combination.encrypted { words(["--object", SECRET]) } else { Vec::new() }
    }

    /// The words that name the image.
    fn image(&self) -> Vec<String> {
        if !self.combination.encrypted {
            return words(["-f", "qcow2", "image"]);
        }
        let options = "driver=qcow2,file.filename=image,encrypt.key-secret=key";
        [self.secret(), words(["--image-opts", options])].concat()
    }

    /// The image, beneath it a disk of half its length.
    fn create(&mut self, by: &Tools) -> Result<()> {
        let mut options = self.combination.options();
        if self.combination.encrypted {
            options.push_str(",encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10");
        }
        match self.combination.data {
            Data::Inside => {}
            Data::File => options.push_str(",data_file=data"),
            Data::RawFile => options.push_str(",data_file=data,data_file_raw=on"),
        }
        let format = match self.combination.backing {
            Backing::None => None,
            Backing::Raw => Some("raw"),
            Backing::Qcow2 => Some("qcow2"),
        };
        let mut more = Vec::new();
        if let Some(format) = format {
            let half = SIZE / 2;
            by.img(self.folder, &words(["create", "-q", "-f", format, "base", &half.to_string()]))?;
            let image = words(["-f", format, "base"]);
            by.io(self.folder, &image, [format!("write -q -P 90 0 {half}")].into_iter())?;
            self.content[..half].fill(90);
            more = words(["-b", "base", "-F", format]);
        }
        let begin = words(["create", "-q", "-f", "qcow2", "-o", &options]);
        let end = words(["image", &SIZE.to_string()]);
        by.img(self.folder, &[begin, self.secret(), more, end].concat())
    }

    fn write(&mut self, by: &Tools, writes: &[Write]) -> Result<()> {
        by.io(self.folder, &self.image(), writes.iter().map(Write::command))?;
        writes.iter().for_each(|write| write.apply(&mut self.content));
        Ok(())
    }

    fn snapshot(&self, by: &Tools, action: &str) -> Result<()> {
        let mut image = self.image();
        if !self.combination.encrypted {
            // The subcommand finds the format by itself.
            image = words(["image"]);
        }
        by.img(self.folder, &[words(["snapshot", action, "kept"]), image].concat())
    }

    /// There are no errors and no leaks.
    fn check(&self, by: &Tools) -> Result<()> {
        by.img(self.folder, &[words(["check", "-q"]), self.image()].concat())
    }

    fn compare(&self, by: &Tools, more: &[&str], content: &[u8]) -> Result<()> {
        let more = more.iter().map(|word| (*word).to_owned()).collect();
        let out = words(["-O", "raw"]);
        by.img(self.folder, &[words(["convert", "-q"]), out, more, self.image(), words(["read"])].concat())?;
        let read = fs::read(self.folder.join("read")).context("reading what was converted")?;
        if read.len() != content.len() {
            bail!("{} read {} bytes", by.name(), read.len());
        }
        if let Some(at) = read.iter().zip(content).position(|(read, wanted)| read != wanted) {
            bail!("{} read {} at {at} instead of {}", by.name(), read[at], content[at]);
        }
        Ok(())
    }
}
