//! The tables that tell of NUMA nodes: SRAT and SLIT.

use std::ops::Range;

use crate::AcpiError;
use crate::table::with_body;

/// The distance from a node to itself (ACPI 6.5, 5.2.17).
pub const LOCAL_DISTANCE: u8 = 10;

/// The first APIC id that a local APIC affinity structure can't hold.
const X2APIC_FROM: u32 = 255;
const ENABLED: u32 = 1;

/// A NUMA node: processors and memory that are near each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NumaNode {
    /// The APIC ids of its vCPUs.
    pub apic_ids: Vec<u32>,
    /// Its memory, as guest physical addresses.
    pub memory: Vec<Range<u64>>,
}

/// The NUMA nodes of a machine; a node's place is its proximity domain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numa {
    /// The nodes.
    pub nodes: Vec<NumaNode>,
    /// How far it is from each node, by row, to each: 10 to itself, more to others, 255 if there is no way.
    pub distances: Vec<Vec<u8>>,
}

impl Numa {
    /// The most nodes that can be described.
    pub const MAX_NODES: usize = 128;

    /// Refuses what guests would not believe: Linux then ignores all of it.
    pub(crate) fn validate(&self, machine: &[u32]) -> Result<(), AcpiError> {
        let count = self.nodes.len();
        if !(1..=Self::MAX_NODES).contains(&count) {
            return Err(AcpiError::NodeCount { count, max: Self::MAX_NODES });
        }
        let mut of_nodes: Vec<u32> = self.nodes.iter().flat_map(|node| node.apic_ids.clone()).collect();
        let mut of_machine = machine.to_vec();
        of_nodes.sort_unstable();
        of_machine.sort_unstable();
        if of_nodes != of_machine {
            return Err(AcpiError::NodeCpus);
        }
        let mut memory: Vec<_> = self.nodes.iter().flat_map(|node| node.memory.clone()).collect();
        memory.sort_by_key(|range| range.start);
        let bad = |range: &Range<u64>| AcpiError::Range {
            what: "memory of a NUMA node",
            start: range.start,
            end: range.end,
        };
        for (index, range) in memory.iter().enumerate() {
            if range.is_empty() || index > 0 && memory[index - 1].end > range.start {
                return Err(bad(range));
            }
        }
        let square = self.distances.len() == count && self.distances.iter().all(|row| row.len() == count);
        if !square {
            return Err(AcpiError::NodeDistances { nodes: count });
        }
        for (from, row) in self.distances.iter().enumerate() {
            for (to, distance) in row.iter().enumerate() {
                let good = if from == to { *distance == LOCAL_DISTANCE } else { *distance > LOCAL_DISTANCE };
                if !good {
                    return Err(AcpiError::NodeDistance { from, to, distance: *distance });
                }
            }
        }
        Ok(())
    }
}

/// System resource affinity table (ACPI 6.5, 5.2.16): which processors and memory are in which domain.
pub(crate) fn srat(numa: &Numa) -> Vec<u8> {
    let mut body = 1u32.to_le_bytes().to_vec();
    body.extend_from_slice(&[0; 8]);
    for (domain, node) in (0u32..).zip(&numa.nodes) {
        let [low, high @ ..] = domain.to_le_bytes();
        for apic_id in &node.apic_ids {
            if *apic_id < X2APIC_FROM {
                body.extend_from_slice(&[0, 16, low, *apic_id as u8]);
                body.extend_from_slice(&ENABLED.to_le_bytes());
                // No local SAPIC id; then the rest of the domain, and of the clock domain.
                body.push(0);
                body.extend_from_slice(&high);
                body.extend_from_slice(&[0; 4]);
            } else {
                body.extend_from_slice(&[2, 24, 0, 0]);
                for value in [domain, *apic_id, ENABLED, 0, 0] {
                    body.extend_from_slice(&value.to_le_bytes());
                }
            }
        }
        for range in &node.memory {
            body.extend_from_slice(&[1, 40]);
            body.extend_from_slice(&domain.to_le_bytes());
            body.extend_from_slice(&[0; 2]);
            body.extend_from_slice(&range.start.to_le_bytes());
            body.extend_from_slice(&(range.end - range.start).to_le_bytes());
            body.extend_from_slice(&[0; 4]);
            body.extend_from_slice(&ENABLED.to_le_bytes());
            body.extend_from_slice(&[0; 8]);
        }
    }
    with_body(b"SRAT", 3, &body)
}

/// System locality information table (ACPI 6.5, 5.2.17): the distances between domains.
pub(crate) fn slit(numa: &Numa) -> Vec<u8> {
    let mut body = (numa.nodes.len() as u64).to_le_bytes().to_vec();
    body.extend(numa.distances.iter().flatten());
    with_body(b"SLIT", 1, &body)
}
