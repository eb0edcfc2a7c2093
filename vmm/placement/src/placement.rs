//! A placement that guest and host can have.

use crate::error::PlacementError;
use crate::host;
use crate::spec::{PlacementSpec, SchedulingPolicy, Target};
use crate::thread::{ThreadPlacement, affinity};

/// Where the threads of one VM run.
#[derive(Debug, Clone, Default)]
pub struct Placement {
    /// By number; vCPUs that are not among them stay where they are.
    vcpus: Vec<ThreadPlacement>,
    io: ThreadPlacement,
}

impl Placement {
    /// The placement that `spec` asks for, of a guest with `vcpus` vCPUs. What it does not speak of stays as
    /// it is for the thread that calls this.
    ///
    /// # Errors
    /// [`PlacementError`] if the guest has no such vCPU, or the host no such processor, or it does not
    /// permit the placement: this is tried on a thread.
    pub fn new(spec: &PlacementSpec, vcpus: u32) -> Result<Self, PlacementError> {
        let mut placement = Self { vcpus: Vec::new(), io: ThreadPlacement::default() };
        if *spec == PlacementSpec::default() {
            return Ok(placement);
        }
        // Threads inherit from those that start them; so that a word on some does not reach the others,
        // every thread is placed.
        let plain = ThreadPlacement {
            cpus: if spec.pins.is_empty() { None } else { affinity() },
            policy: (!spec.schedules.is_empty()).then_some(SchedulingPolicy::Other),
        };
        placement.vcpus = vec![plain.clone(); vcpus as usize];
        placement.io = plain;
        let online = host::online()?;
        for pin in &spec.pins {
            if let Some(cpu) = pin.cpus.iter().find(|cpu| !online.contains(*cpu)) {
                return Err(PlacementError::NoCpu { cpu, online: online.to_string() });
            }
        }
        // Words on all vCPUs first.
        for single in [false, true] {
            for pin in spec.pins.iter().filter(|pin| single == matches!(pin.target, Target::Some(_))) {
                let pinned = |thread: &mut ThreadPlacement| thread.cpus = Some(pin.cpus.clone());
                placement.for_each(&pin.target, vcpus, pinned)?;
            }
            let of = |target: &Target| single == matches!(target, Target::Some(_));
            for schedule in spec.schedules.iter().filter(|schedule| of(&schedule.target)) {
                let scheduled = |thread: &mut ThreadPlacement| thread.policy = Some(schedule.policy);
                placement.for_each(&schedule.target, vcpus, scheduled)?;
            }
        }
        placement.rehearse()?;
        Ok(placement)
    }

    fn for_each(
        &mut self,
        target: &Target,
        vcpus: u32,
        place: impl Fn(&mut ThreadPlacement),
    ) -> Result<(), PlacementError> {
        match target {
            Target::Io => place(&mut self.io),
            Target::Vcpus => self.vcpus.iter_mut().for_each(place),
            Target::Some(list) => {
                for vcpu in list.iter() {
                    let missing = || PlacementError::NoVcpu { vcpu, vcpus };
                    place(self.vcpus.get_mut(vcpu as usize).ok_or_else(missing)?);
                }
            }
        }
        Ok(())
    }

    /// Tries everything on a thread that ends then.
    fn rehearse(&self) -> Result<(), PlacementError> {
        std::thread::scope(|scope| {
            let rehearsal = std::thread::Builder::new().name("placement".into()).spawn_scoped(scope, || {
                for vcpu in (0..).take(self.vcpus.len()) {
                    self.place_vcpu(vcpu)?;
                }
                self.place_io()
            });
            match rehearsal.map_err(PlacementError::Thread)?.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Places the calling thread as that of a vCPU.
    ///
    /// # Errors
    /// [`PlacementError`] if the host has changed its mind.
    pub fn place_vcpu(&self, vcpu: u32) -> Result<(), PlacementError> {
        let placement = self.vcpus.get(vcpu as usize);
        placement.map_or(Ok(()), |placement| placement.apply(|| format!("vCPU {vcpu}")))
    }

    /// Places the calling thread as one that is no vCPU's. Threads that it starts are placed with it.
    ///
    /// # Errors
    /// [`PlacementError`] if the host has changed its mind.
    pub fn place_io(&self) -> Result<(), PlacementError> {
        self.io.apply(|| "an I/O thread".to_owned())
    }

    /// Whether there is nothing to place.
    pub fn is_empty(&self) -> bool {
        self.vcpus.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuList;

    fn spec(pins: &[&str], schedules: &[&str]) -> PlacementSpec {
        PlacementSpec {
            pins: pins.iter().map(|text| text.parse().unwrap()).collect(),
            schedules: schedules.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    /// What a thread of its own finds after `place`.
    fn on_a_thread(place: impl FnOnce() + Send) -> (CpuList, u32) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                place();
                let text = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
                // The policy is field 41, and the name, field 2, may have anything in it but `) `.
                let policy = text.rsplit_once(") ").unwrap().1.split(' ').nth(38).unwrap();
                (affinity().unwrap(), policy.parse().unwrap())
            });
            thread.join().unwrap()
        })
    }

    #[test]
    fn threads_are_placed_each_as_asked() {
        let all = affinity().unwrap();
        let first = all.iter().next().unwrap();
        let placement = Placement::new(&spec(&["vcpus=0-1023", "1=0"], &[]), 2);
        assert!(matches!(placement, Err(PlacementError::NoCpu { .. })));

        let one = format!("1={first}");
        let placement = Placement::new(&spec(&[&one], &["1=batch"]), 3).unwrap();
        let pinned = CpuList::new([first]).unwrap();
        assert_eq!(on_a_thread(|| placement.place_vcpu(1).unwrap()), (pinned.clone(), 3));
        // A thread that a pinned one starts is not pinned.
        let inherited = on_a_thread(|| {
            placement.place_vcpu(1).unwrap();
            placement.place_io().unwrap();
        });
        assert_eq!(inherited, (all.clone(), 0));
        assert_eq!(on_a_thread(|| placement.place_vcpu(2).unwrap()), (all.clone(), 0));

        let words = [format!("0={first}"), format!("vcpus={all}"), format!("io={first}")];
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let placement = Placement::new(&spec(&words, &[]), 2).unwrap();
        assert_eq!(on_a_thread(|| placement.place_vcpu(0).unwrap()).0, pinned, "the narrower word counts");
        assert_eq!(on_a_thread(|| placement.place_vcpu(1).unwrap()).0, all);
        assert_eq!(on_a_thread(|| placement.place_io().unwrap()).0, pinned);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let missing = Placement::new(&spec(&["2=0"], &[]), 2);
        assert!(matches!(missing, Err(PlacementError::NoVcpu { vcpu: 2, vcpus: 2 })));
        let missing = Placement::new(&spec(&["io=1023"], &[]), 2);
        assert!(matches!(missing, Err(PlacementError::NoCpu { cpu: 1023, .. })));
    }

    #[test]
    fn real_time_needs_permission() {
        match Placement::new(&spec(&[], &["0=fifo:7", "1=rr:8"]), 2) {
            Ok(placement) => {
                assert_eq!(on_a_thread(|| placement.place_vcpu(0).unwrap()).1, 1);
                assert_eq!(on_a_thread(|| placement.place_vcpu(1).unwrap()).1, 2);
                assert_eq!(on_a_thread(|| placement.place_io().unwrap()).1, 0);
            }
            Err(error) => {
                assert!(matches!(error, PlacementError::NoPermission { .. }), "{error}");
                eprintln!("LEFT OUT: {error}");
            }
        }
    }

    #[test]
    fn nothing_asked_is_nothing_done() {
        let placement = Placement::new(&PlacementSpec::default(), 2).unwrap();
        assert!(placement.is_empty());
        placement.place_vcpu(0).unwrap();
        placement.place_io().unwrap();
    }
}
