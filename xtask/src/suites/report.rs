//! What came of the tests.

use serde::Serialize;
use std::fmt;

/// What came of a test on one engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "result", content = "detail", rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// All its checks hold.
    Pass(String),
    /// Some do not, or it did not come to its end; which.
    Fail(String),
    /// It says itself that it needs what is not there.
    Skip,
    /// It did not end in time.
    Timeout,
}

impl Verdict {
    fn word(&self) -> &'static str {
        match self {
            Self::Pass(_) => "pass",
            Self::Fail(_) => "FAIL",
            Self::Skip => "skip",
            Self::Timeout => "TIMEOUT",
        }
    }

    fn detail(&self) -> &str {
        match self {
            Self::Pass(detail) | Self::Fail(detail) => detail,
            Self::Skip | Self::Timeout => "",
        }
    }

    fn passes(&self) -> bool {
        matches!(self, Self::Pass(_))
    }
}

/// One test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Row {
    /// Its name.
    pub(crate) test: String,
    /// What came of it, in the order of [`Report::engines`].
    pub(crate) verdicts: Vec<Verdict>,
}

/// One suite.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Its name.
    pub(crate) suite: &'static str,
    /// The columns; TCG's, if there, is the last.
    pub(crate) engines: Vec<String>,
    /// The tests.
    pub(crate) rows: Vec<Row>,
}

impl Report {
    /// The tests that pass on TCG and not on one of ours, and those that do the opposite: pass on all of ours.
    fn differences(&self) -> Option<[Vec<&str>; 2]> {
        if self.engines.len() < 2 || self.engines.last().is_none_or(|name| name != "TCG") {
            return None;
        }
        let mut lists = [Vec::new(), Vec::new()];
        for row in &self.rows {
            let Some((tcg, ours)) = row.verdicts.split_last() else { continue };
            let all = ours.iter().all(Verdict::passes);
            match (tcg.passes(), all) {
                (true, false) => lists[0].push(row.test.as_str()),
                (false, true) => lists[1].push(row.test.as_str()),
                _ => {}
            }
        }
        Some(lists)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.rows.iter().map(|row| row.test.len()).max().unwrap_or(0).max(self.suite.len());
        let cells = |row: &Row| -> Vec<String> {
            let cell = |verdict: &Verdict| format!("{} {}", verdict.word(), verdict.detail());
            row.verdicts.iter().map(cell).collect()
        };
        let columns: Vec<usize> = (0..self.engines.len())
            .map(|index| {
                let widest = self.rows.iter().filter_map(|row| cells(row).get(index).map(String::len)).max();
                widest.unwrap_or(0).max(self.engines[index].len())
            })
            .collect();
        let mut line = |first: &str, rest: &[String]| {
            let rest: String =
                rest.iter().zip(&columns).map(|(cell, width)| format!("  {cell:width$}")).collect();
            writeln!(f, "{}", format!("{first:width$}{rest}").trim_end())
        };
        line(self.suite, &self.engines)?;
        for row in &self.rows {
            line(&row.test, &cells(row))?;
        }
        let totals: Vec<String> = (0..self.engines.len())
            .map(|index| {
                let count =
                    |word: &str| self.rows.iter().filter(|row| row.verdicts[index].word() == word).count();
                let [pass, fail, skip, late] = ["pass", "FAIL", "skip", "TIMEOUT"].map(count);
                format!("{pass} pass, {fail} fail, {skip} skip, {late} late")
            })
            .collect();
        line("in all", &totals)?;
        if let Some(lists) = self.differences() {
            for (what, tests) in ["TCG passes, we fail", "we pass, TCG fails"].iter().zip(lists) {
                writeln!(f, "{what} ({}): {}", tests.len(), tests.join(" "))?;
            }
        }
        writeln!(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_and_differences() {
        let row = |test: &str, verdicts: [Verdict; 3]| Row { test: test.into(), verdicts: verdicts.into() };
        let pass = || Verdict::Pass("3 checks".into());
        let report = Report {
            suite: "suite",
            engines: ["translator", "interpreter", "TCG"].map(Into::into).into(),
            rows: vec![
                row("both", [pass(), pass(), pass()]),
                row("worse", [pass(), Verdict::Timeout, pass()]),
                row("better", [pass(), pass(), Verdict::Fail("1 of 3".into())]),
                row("neither", [Verdict::Skip, Verdict::Skip, Verdict::Skip]),
            ],
        };
        assert_eq!(report.differences(), Some([vec!["worse"], vec!["better"]]));
        let text = report.to_string();
        assert!(text.contains("FAIL 1 of 3"), "{text}");
        assert!(text.contains("2 pass, 0 fail, 1 skip, 1 late"), "{text}");
        assert!(text.contains("we pass, TCG fails (1): better\n"), "{text}");
    }
}
