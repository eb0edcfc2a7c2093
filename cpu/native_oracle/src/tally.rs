//! What was compared with the host, form by form of instructions.

use crate::Mode;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// How many differences of a form are shown.
const SHOWN: usize = 3;

#[derive(Default)]
struct Count {
    comparisons: usize,
    /// Those that differ.
    differences: Vec<String>,
}

/// Counts comparisons, each of one execution by the host and by us, by instruction form.
///
/// [`finish`](Self::finish) prints them as lines that `cargo xtask isa` collects.
pub struct Tally {
    mode: Mode,
    forms: BTreeMap<String, Count>,
}

impl Tally {
    /// None yet, of instructions executed in `mode`.
    pub fn new(mode: Mode) -> Self {
        Self { mode, forms: BTreeMap::new() }
    }

    /// Counts `comparisons` of `form`, which is a `Code` of iced-x86.
    pub fn add(&mut self, form: impl Debug, comparisons: usize) {
        self.forms.entry(format!("{form:?}")).or_default().comparisons += comparisons;
    }

    /// Notes that one of the comparisons differs; `text` says how.
    pub fn fail(&mut self, form: impl Debug, text: String) {
        self.forms.entry(format!("{form:?}")).or_default().differences.push(text);
    }

    /// How many forms were compared.
    pub fn forms(&self) -> usize {
        self.forms.values().filter(|count| count.comparisons != 0).count()
    }

    /// Whether `form` was compared.
    pub fn contains(&self, form: impl Debug) -> bool {
        self.forms.get(&format!("{form:?}")).is_some_and(|count| count.comparisons != 0)
    }

    /// Prints a line for each form, and what differs.
    ///
    /// # Panics
    /// If anything differs.
    pub fn finish(self) {
        let bits = match self.mode {
            Mode::Bits64 => 64,
            Mode::Bits32 => 32,
            Mode::Bits16 => 16,
        };
        for (form, Count { comparisons, differences }) in &self.forms {
            println!("{form} in {bits}-bit code: {comparisons} comparisons, {} differ", differences.len());
        }
        let wrong: Vec<_> = self.forms.iter().filter(|(_, count)| !count.differences.is_empty()).collect();
        for (form, Count { differences, .. }) in &wrong {
            eprintln!("{form} differs:");
            for text in differences.iter().take(SHOWN) {
                eprintln!("    {}", text.chars().take(1000).collect::<String>());
            }
        }
        assert!(wrong.is_empty(), "{} instruction forms differ from the host's", wrong.len());
    }
}

/// The seed of random operands: 1, or the number in the environment's `T0_SEED`.
///
/// # Panics
/// If that is none.
pub fn seed() -> u64 {
    number("T0_SEED")
}

/// By how much more than usual is to be compared: 1, or the number in the environment's `T0_ROUNDS`.
///
/// # Panics
/// If that is none.
pub fn rounds() -> u64 {
    number("T0_ROUNDS")
}

fn number(variable: &str) -> u64 {
    std::env::var(variable).map_or(1, |text| {
        text.parse().unwrap_or_else(|_| panic!("{variable} is {text:?}, which is no number"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_counted() {
        let mut tally = Tally::new(Mode::Bits64);
        tally.add("Nopd", 3);
        tally.add("Nopd", 2);
        tally.add("Nopq", 0);
        assert_eq!((tally.forms(), tally.contains("Nopd"), tally.contains("Nopq")), (1, true, false));
        tally.finish();
    }

    #[test]
    #[should_panic(expected = "1 instruction forms differ")]
    fn differences_fail() {
        let mut tally = Tally::new(Mode::Bits16);
        tally.add("Nopd", 3);
        tally.fail("Nopd", "it does nothing".into());
        tally.finish();
    }
}
