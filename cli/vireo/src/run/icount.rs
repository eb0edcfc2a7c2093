//! `--icount KEY=VALUE,…`, `--record` and `--replay`.

use super::words::{split, switch};
use machine::{DeterministicSpec, TraceSpec};
use std::path::PathBuf;

/// What `--icount` takes.
const ACCEPTED: &str =
    "shift=N from 0 to 10, sleep=on|off, seed=N, rtc=SECONDS, rr=record|replay with rrfile=FILE";

/// The options of `--icount`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Icount(DeterministicSpec);

/// Reads the options of `--icount`. A comma in a value is written twice.
pub(crate) fn parse(text: &str) -> Result<Icount, String> {
    let mut spec = DeterministicSpec::default();
    let (mut replays, mut file) = (None, None);
    for word in split(text) {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("{word:?} is no option of --icount; accepted are {ACCEPTED}"));
        };
        let wrong = |accepted: &str| format!("{key}={value} is not possible; accepted is {accepted}");
        match key {
            "shift" if value == "auto" => {
                return Err("shift=auto follows the host's time, which is never the same; accepted is shift=N, 0 to 10".into());
            }
            "shift" => {
                let shift = value.parse().ok().filter(|shift| *shift <= clock::MAX_SHIFT);
                spec.shift = shift.ok_or_else(|| wrong("a number from 0 to 10"))?;
            }
            "sleep" => spec.sleep = switch(key, value)?,
            "align" => {
                if switch(key, value)? {
                    return Err(wrong("align=off: the guest's time never waits for the host's"));
                }
            }
            "seed" => spec.seed = value.parse().map_err(|_| wrong("a number of 64 bits"))?,
            "rtc" => spec.epoch = value.parse().map_err(|_| wrong("a number of seconds since 1970"))?,
            "rr" => {
                replays = match value {
                    "record" => Some(false),
                    "replay" => Some(true),
                    _ => return Err(wrong("rr=record or rr=replay")),
                }
            }
            "rrfile" if !value.is_empty() => file = Some(PathBuf::from(value)),
            _ => return Err(format!("{key:?} is no option of --icount; accepted are {ACCEPTED}")),
        }
    }
    spec.trace = match (replays, file) {
        (Some(false), Some(file)) => Some(TraceSpec::Record(file)),
        (Some(true), Some(file)) => Some(TraceSpec::Replay(file)),
        (None, None) => None,
        _ => return Err("rr=record and rr=replay need rrfile=FILE, and that one of them".into()),
    };
    Ok(Icount(spec))
}

/// What the three options ask for together. (That `--replay` comes without `--icount` the command line says.)
pub(super) fn spec(
    icount: Option<&Icount>,
    record: Option<&PathBuf>,
    replay: Option<&PathBuf>,
) -> Result<Option<DeterministicSpec>, String> {
    let trace = record
        .map(|file| TraceSpec::Record(file.clone()))
        .or_else(|| replay.map(|file| TraceSpec::Replay(file.clone())));
    if icount.is_none() && trace.is_none() {
        return Ok(None);
    }
    let mut spec = icount.cloned().unwrap_or_default().0;
    if trace.is_some() && spec.trace.is_some() {
        return Err("--record does not go with rr= of --icount".into());
    }
    spec.trace = trace.or(spec.trace);
    Ok(Some(spec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_as_people_ask_for_it() {
        assert_eq!(parse("").unwrap().0, DeterministicSpec::default());
        let spec = parse("shift=7,sleep=off,align=off,seed=12,rtc=-1,rr=record,rrfile=a,,b").unwrap().0;
        let expected = DeterministicSpec {
            shift: 7,
            sleep: false,
            seed: 12,
            epoch: -1,
            trace: Some(TraceSpec::Record("a,b".into())),
        };
        assert_eq!(spec, expected);
        for text in
            ["shift", "shift=11", "shift=auto", "sleep=1", "align=on", "rr=record", "rrfile=x", "rr=x", "x=1"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_options_together() {
        let file = PathBuf::from("f");
        assert_eq!(spec(None, None, None), Ok(None));
        let trace = |spec: Result<Option<DeterministicSpec>, String>| spec.unwrap().unwrap().trace;
        assert_eq!(trace(spec(None, Some(&file), None)), Some(TraceSpec::Record("f".into())));
        assert_eq!(trace(spec(None, None, Some(&file))), Some(TraceSpec::Replay("f".into())));
        let icount = parse("rr=replay,rrfile=g").unwrap();
        assert_eq!(trace(spec(Some(&icount), None, None)), Some(TraceSpec::Replay("g".into())));
        assert!(spec(Some(&icount), Some(&file), None).is_err());
    }
}
