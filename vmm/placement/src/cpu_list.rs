//! Lists of processors as people and the kernel write them.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// The highest number of a processor that can be named.
pub const MAX_CPU: u32 = 1023;

/// A set of processors, written as `0-3,8` or, as libvirt has it, `0-7,^3`. It is never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(BTreeSet<u32>);

/// Why a text is no [`CpuList`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no list of CPUs; accepted are numbers up to {MAX_CPU} and ranges, such as 0-3,8 or 0-7,^3"
)]
pub struct CpuListError {
    text: String,
}

impl CpuList {
    /// The list of these processors; `None` if there are none.
    pub fn new(cpus: impl IntoIterator<Item = u32>) -> Option<Self> {
        let cpus: BTreeSet<_> = cpus.into_iter().collect();
        (!cpus.is_empty()).then_some(Self(cpus))
    }

    /// The processors, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// Whether `cpu` is one of them.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let error = || CpuListError { text: text.into() };
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let number = digits.then(|| text.parse().ok()).flatten();
            number.filter(|number| *number <= MAX_CPU).ok_or_else(error)
        };
        let mut cpus = BTreeSet::new();
        for part in text.split(',').map(str::trim) {
            let (part, out) = part.strip_prefix('^').map_or((part, false), |rest| (rest, true));
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first.trim())?, number(last.trim())?);
            if first > last {
                return Err(error());
            }
            for cpu in first..=last {
                if out {
                    cpus.remove(&cpu);
                } else {
                    cpus.insert(cpu);
                }
            }
        }
        Self::new(cpus).ok_or_else(error)
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if_eq(&(last + 1)) {
                last = next;
            }
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists_people_write() {
        for (text, printed) in
            [("0", "0"), ("3,1,2", "1-3"), ("0-7,^3", "0-2,4-7"), (" 1 - 2 , 9", "1-2,9"), ("1023", "1023")]
        {
            assert_eq!(text.parse::<CpuList>().unwrap().to_string(), printed, "{text}");
        }
        for text in ["", ",", "1,", "a", "-1", "2-1", "1024", "0-99999999999", "^1", "1,^1", "1--2", "+1"] {
            assert!(text.parse::<CpuList>().is_err(), "{text}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_printed_reads_as_the_same(cpus in proptest::collection::btree_set(0..=MAX_CPU, 1..50)) {
            let list = CpuList::new(cpus).unwrap();
            prop_assert_eq!(list.to_string().parse::<CpuList>().unwrap(), list);
        }

        #[test]
        fn any_text_is_a_list_or_an_error(text in "[0-9,^ -]{0,20}") {
            let _ = text.parse::<CpuList>();
        }
    }
}
