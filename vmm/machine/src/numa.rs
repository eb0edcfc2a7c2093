//! The guest's NUMA nodes: which vCPUs and which memory are near each other, and where on the host.

use acpi::{LOCAL_DISTANCE, Numa, NumaNode};
use guest_memory::{NodeBinding, NodePolicy};
use std::ops::Range;

/// The distance between nodes that nobody said anything of (Linux's REMOTE_DISTANCE).
const REMOTE_DISTANCE: u8 = 20;
/// What memory is shared out in among nodes that do not say how much they have.
const SHARE: u64 = 2 << 20;

/// The guest's NUMA nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NumaSpec {
    /// The nodes, by number.
    pub nodes: Vec<NodeSpec>,
    /// Distances between nodes; what is not said is as the other way round, or else 20.
    pub distances: Vec<NodeDistance>,
}

/// One NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its vCPUs. If no node names any, they are shared out evenly.
    pub vcpus: Vec<u32>,
    /// Its memory in bytes. If no node says how much, it is shared out evenly; a node that alone does not
    /// say has none.
    pub memory: Option<u64>,
    /// The host's nodes that its memory is taken from; from anywhere if there are none.
    pub host_nodes: Vec<u32>,
    /// How it is taken from them.
    pub policy: NodePolicy,
}

/// A distance between two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeDistance {
    /// From this node
    pub source: u32,
    /// to this one.
    pub destination: u32,
    /// 10 is the distance of a node to itself; 255 says that there is no way.
    pub distance: u32,
}

/// Why NUMA nodes are not possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NumaError {
    /// Too many nodes.
    #[error("{count} NUMA nodes are not possible; accepted are 1 to {most}")]
    Count {
        /// The number asked for.
        count: usize,
        /// The most.
        most: usize,
    },
    /// Distances without nodes.
    #[error("NUMA distances are given, and no nodes; add --numa node,...")]
    NoNodes,
    /// A vCPU that the guest does not have.
    #[error("NUMA node {node} has vCPU {vcpu}, and the guest has {vcpus}, numbered from 0")]
    NoVcpu {
        /// The node.
        node: usize,
        /// The vCPU.
        vcpu: u32,
        /// How many the guest has.
        vcpus: u32,
    },
    /// A vCPU in two nodes.
    #[error("vCPU {vcpu} is in NUMA node {first} and in node {second}; it can be in one only")]
    VcpuTwice {
        /// The vCPU.
        vcpu: u32,
        /// One node.
        first: usize,
        /// The other.
        second: usize,
    },
    /// A vCPU in no node.
    #[error("vCPU {vcpu} is in no NUMA node; say cpus= so that each vCPU is in one, or not at all")]
    VcpuNowhere {
        /// The vCPU.
        vcpu: u32,
    },
    /// The nodes' memory is not the guest's.
    #[error(
        "the NUMA nodes have {nodes} bytes of memory together, and the guest has {guest}; make them equal"
    )]
    Memory {
        /// Of all nodes.
        nodes: u128,
        /// The guest's.
        guest: u64,
    },
    /// A node's memory is not whole pages.
    #[error("NUMA node {node} has {bytes} bytes of memory; accepted are multiples of {page}")]
    Unaligned {
        /// The node.
        node: usize,
        /// Its memory.
        bytes: u64,
        /// The page size.
        page: u64,
    },
    /// A distance from or to a node that there is not.
    #[error("a distance is given for NUMA node {node}, and the guest has {nodes}, numbered from 0")]
    NoNode {
        /// The node.
        node: u32,
        /// How many there are.
        nodes: usize,
    },
    /// A distance that cannot be.
    #[error(
        "distance {distance} from NUMA node {from} to {to} is not possible; accepted are 10 from \
         a node to itself, and 11 to 254 to others, or 255 where there is no way"
    )]
    Distance {
        /// From.
        from: u32,
        /// To.
        to: u32,
        /// The distance.
        distance: u32,
    },
    /// A distance that differs from that of the way back, or from what was said before.
    #[error(
        "the distance between NUMA nodes {from} and {to} is given as {first} and as {second}; it \
         is the same both ways"
    )]
    Asymmetric {
        /// One node.
        from: u32,
        /// The other.
        to: u32,
        /// What was said first.
        first: u32,
        /// What was said then.
        second: u32,
    },
}

/// The guest's NUMA nodes, checked against the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NumaNodes {
    nodes: Vec<NodeSpec>,
    distances: Vec<Vec<u8>>,
    /// The memory of each.
    memory: Vec<u64>,
}

impl NumaNodes {
    /// The nodes that `spec` describes, of a guest with `vcpus` vCPUs and `memory` bytes in pages of
    /// `page`; `None` if it has no nodes.
    pub(crate) fn new(
        spec: &NumaSpec,
        vcpus: u32,
        memory: u64,
        page: u64,
    ) -> Result<Option<Self>, NumaError> {
        let count = spec.nodes.len();
        if count == 0 {
            return if spec.distances.is_empty() { Ok(None) } else { Err(NumaError::NoNodes) };
        }
        if count > Numa::MAX_NODES {
            return Err(NumaError::Count { count, most: Numa::MAX_NODES });
        }
        let mut nodes = spec.nodes.clone();
        share_vcpus(&mut nodes, vcpus)?;
        let memory = share_memory(&nodes, memory, page)?;
        Ok(Some(Self { nodes, distances: distances(spec)?, memory }))
    }

    /// Each node's memory in a guest that has its memory at `ram`: it is dealt out in order.
    fn ranges(&self, ram: &[Range<u64>]) -> Vec<Vec<Range<u64>>> {
        let mut left = ram.iter().cloned();
        let mut here = left.next();
        let deal = |bytes: &u64| {
            let mut wanted = *bytes;
            let mut ranges = Vec::new();
            while wanted > 0 {
                let Some(range) = &mut here else { break };
                let taken = wanted.min(range.end - range.start);
                ranges.push(range.start..range.start + taken);
                range.start += taken;
                wanted -= taken;
                if range.is_empty() {
                    here = left.next();
                }
            }
            ranges
        };
        self.memory.iter().map(deal).collect()
    }

    /// What the guest is told.
    pub(crate) fn acpi(&self, ram: &[Range<u64>]) -> Numa {
        let nodes = self.nodes.iter().zip(self.ranges(ram));
        let nodes = nodes.map(|(node, memory)| NumaNode { apic_ids: node.vcpus.clone(), memory });
        Numa { nodes: nodes.collect(), distances: self.distances.clone() }
    }

    /// How many vCPUs a socket can have so that it is in one node: guests don't believe otherwise. A power of
    /// two, as APIC ids number sockets, or all of them.
    pub(crate) fn socket_vcpus(&self) -> u32 {
        let inside = |node: &NodeSpec, size: u32| {
            // With each of its vCPUs a node has the whole socket, as far as there are vCPUs.
            let count: usize = self.nodes.iter().map(|node| node.vcpus.len()).sum();
            node.vcpus.iter().all(|vcpu| {
                let socket = vcpu / size * size..(vcpu / size * size).saturating_add(size);
                socket.take_while(|vcpu| (*vcpu as usize) < count).all(|vcpu| node.vcpus.contains(&vcpu))
            })
        };
        if self.nodes.len() == 1 {
            return u32::MAX;
        }
        let sizes = (0..8).rev().map(|bit| 1 << bit);
        sizes.into_iter().find(|size| self.nodes.iter().all(|node| inside(node, *size))).unwrap_or(1)
    }

    /// Where on the host its memory is to be.
    pub(crate) fn bindings(&self, ram: &[Range<u64>]) -> Vec<NodeBinding> {
        let mut bindings = Vec::new();
        for (node, ranges) in self.nodes.iter().zip(self.ranges(ram)) {
            if node.host_nodes.is_empty() {
                continue;
            }
            let binding = |range| NodeBinding { range, nodes: node.host_nodes.clone(), policy: node.policy };
            bindings.extend(ranges.into_iter().map(binding));
        }
        bindings
    }
}

/// Sees to it that each vCPU is in one node.
fn share_vcpus(nodes: &mut [NodeSpec], vcpus: u32) -> Result<(), NumaError> {
    let count = nodes.len();
    if nodes.iter().all(|node| node.vcpus.is_empty()) {
        // Neighbours together, as the cores of a socket are.
        for vcpu in 0..vcpus {
            nodes[vcpu as usize * count / vcpus as usize].vcpus.push(vcpu);
        }
        return Ok(());
    }
    let mut of = vec![None; vcpus as usize];
    for (number, node) in nodes.iter().enumerate() {
        for vcpu in &node.vcpus {
            let missing = || NumaError::NoVcpu { node: number, vcpu: *vcpu, vcpus };
            let place = of.get_mut(*vcpu as usize).ok_or_else(missing)?;
            if let Some(first) = place.replace(number) {
                return Err(NumaError::VcpuTwice { vcpu: *vcpu, first, second: number });
            }
        }
    }
    match (0..).zip(&of).find(|(_, node)| node.is_none()) {
        Some((vcpu, _)) => Err(NumaError::VcpuNowhere { vcpu }),
        None => Ok(()),
    }
}

/// The memory of each node.
fn share_memory(nodes: &[NodeSpec], memory: u64, page: u64) -> Result<Vec<u64>, NumaError> {
    if nodes.iter().all(|node| node.memory.is_none()) {
        let unit = SHARE.max(page);
        let share = memory / nodes.len() as u64 / unit * unit;
        let mut shares = vec![share; nodes.len()];
        if let Some(last) = shares.last_mut() {
            *last = memory - share * (nodes.len() as u64 - 1);
        }
        return Ok(shares);
    }
    let shares: Vec<u64> = nodes.iter().map(|node| node.memory.unwrap_or(0)).collect();
    let sum: u128 = shares.iter().map(|share| u128::from(*share)).sum();
    if sum != u128::from(memory) {
        return Err(NumaError::Memory { nodes: sum, guest: memory });
    }
    match shares.iter().enumerate().find(|(_, share)| !share.is_multiple_of(page)) {
        Some((node, bytes)) => Err(NumaError::Unaligned { node, bytes: *bytes, page }),
        None => Ok(shares),
    }
}

/// The table of distances.
fn distances(spec: &NumaSpec) -> Result<Vec<Vec<u8>>, NumaError> {
    let count = spec.nodes.len();
    let mut said = vec![vec![None; count]; count];
    for &NodeDistance { source, destination, distance } in &spec.distances {
        if let Some(node) = [source, destination].into_iter().find(|node| *node as usize >= count) {
            return Err(NumaError::NoNode { node, nodes: count });
        }
        let least = u32::from(LOCAL_DISTANCE);
        let good = if source == destination { distance == least } else { distance > least };
        let Some(distance) = u8::try_from(distance).ok().filter(|_| good) else {
            return Err(NumaError::Distance { from: source, to: destination, distance });
        };
        for (row, column) in [(source, destination), (destination, source)] {
            let place = &mut said[row as usize][column as usize];
            match *place {
                Some(first) if first != distance => {
                    let (first, second) = (u32::from(first), u32::from(distance));
                    return Err(NumaError::Asymmetric { from: source, to: destination, first, second });
                }
                _ => *place = Some(distance),
            }
        }
    }
    let row = |(from, row): (usize, &Vec<Option<u8>>)| {
        let unsaid = |to| if from == to { LOCAL_DISTANCE } else { REMOTE_DISTANCE };
        row.iter().enumerate().map(|(to, distance)| distance.unwrap_or(unsaid(to))).collect()
    };
    Ok(said.iter().enumerate().map(row).collect())
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // memory is ranges, and there may be one of them
mod tests {
    use super::*;

    fn node(vcpus: &[u32], memory: Option<u64>) -> NodeSpec {
        NodeSpec { vcpus: vcpus.to_vec(), memory, ..NodeSpec::default() }
    }

    fn spec(nodes: &[NodeSpec], distances: &[(u32, u32, u32)]) -> NumaSpec {
        let distance = |&(source, destination, distance): &_| NodeDistance { source, destination, distance };
        NumaSpec { nodes: nodes.to_vec(), distances: distances.iter().map(distance).collect() }
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn memory_and_vcpus_are_dealt_out_in_order() {
        let nodes = [node(&[0, 2], Some(1024 * MIB)), node(&[1], Some(2048 * MIB))];
        let nodes = NumaNodes::new(&spec(&nodes, &[(0, 1, 31)]), 3, 3072 * MIB, 4096).unwrap().unwrap();
        let told = nodes.acpi(&[0..2048 * MIB, 4096 * MIB..5120 * MIB]);
        assert_eq!(told.nodes[0].memory, [0..1024 * MIB]);
        assert_eq!(told.nodes[1].memory, [1024 * MIB..2048 * MIB, 4096 * MIB..5120 * MIB]);
        assert_eq!(told.nodes[0].apic_ids, [0, 2]);
        assert_eq!(told.distances, [[10, 31], [31, 10]]);
        assert!(nodes.bindings(&[0..3072 * MIB]).is_empty());

        let plain = vec![NodeSpec::default(); 2];
        let nodes = NumaNodes::new(&spec(&plain, &[]), 5, 101 * MIB, 4096).unwrap().unwrap();
        let ram = 0..101 * MIB;
        let told = nodes.acpi(&[ram]);
        assert_eq!((told.nodes[0].apic_ids.len(), told.nodes[1].apic_ids.len()), (3, 2));
        assert_eq!((told.nodes[0].memory[0].end, told.nodes[1].memory[0].end), (50 * MIB, 101 * MIB));
        assert_eq!(told.distances[0], [10, 20]);
        assert_eq!(NumaNodes::new(&NumaSpec::default(), 1, MIB, 4096), Ok(None));
    }

    #[test]
    fn a_socket_is_in_one_node() {
        let size = |nodes: &[&[u32]]| {
            let count = nodes.iter().map(|vcpus| vcpus.len()).sum::<usize>() as u32;
            let nodes: Vec<_> = nodes.iter().map(|vcpus| node(vcpus, None)).collect();
            NumaNodes::new(&spec(&nodes, &[]), count, MIB, 4096).unwrap().unwrap().socket_vcpus()
        };
        assert_eq!(size(&[&[0, 1], &[2, 3]]), 2);
        assert_eq!(size(&[&[0, 2], &[1, 3]]), 1);
        assert_eq!(size(&[&[0, 1, 2, 3], &[4, 5], &[]]), 4);
        assert_eq!(size(&[&[0, 1, 2, 3], &[4, 5], &[6, 7]]), 2);
        assert_eq!(size(&[&[0, 1, 2, 3], &[4]]), 4);
        assert_eq!(size(&[&[0, 1, 2], &[3]]), 1);
        assert_eq!(size(&[&[0, 1, 2]]), u32::MAX);
    }

    #[test]
    fn memory_is_bound_where_a_node_says() {
        let mut nodes = vec![node(&[0], Some(MIB)), node(&[1], Some(MIB)), node(&[], None)];
        nodes[1].host_nodes = vec![0, 3];
        nodes[1].policy = NodePolicy::Interleave;
        nodes[2].host_nodes = vec![1];
        let nodes = NumaNodes::new(&spec(&nodes, &[]), 2, 2 * MIB, 4096).unwrap().unwrap();
        let ram = 0..2 * MIB;
        let expected = NodeBinding { range: MIB..2 * MIB, nodes: vec![0, 3], policy: NodePolicy::Interleave };
        assert_eq!(nodes.bindings(&[ram]), [expected]);
    }

    #[test]
    fn impossible_nodes_are_refused() {
        let make = |nodes: &[NodeSpec], distances: &[(u32, u32, u32)]| {
            NumaNodes::new(&spec(nodes, distances), 2, 2 * MIB, 4096).unwrap_err()
        };
        let two = [node(&[0], None), node(&[1], None)];
        assert_eq!(make(&[], &[(0, 1, 20)]), NumaError::NoNodes);
        let many = vec![NodeSpec::default(); 129];
        assert_eq!(make(&many, &[]), NumaError::Count { count: 129, most: 128 });
        let missing = make(&[node(&[0, 1, 2], None)], &[]);
        assert_eq!(missing, NumaError::NoVcpu { node: 0, vcpu: 2, vcpus: 2 });
        let twice = make(&[node(&[0, 1], None), node(&[1], None)], &[]);
        assert_eq!(twice, NumaError::VcpuTwice { vcpu: 1, first: 0, second: 1 });
        assert_eq!(make(&[node(&[1], None)], &[]), NumaError::VcpuNowhere { vcpu: 0 });
        let sizes = |first, second| [node(&[0], Some(first)), node(&[1], second)];
        assert_eq!(
            make(&sizes(MIB, Some(u64::MAX)), &[]),
            NumaError::Memory { nodes: u128::from(u64::MAX) + u128::from(MIB), guest: 2 * MIB }
        );
        assert!(matches!(make(&sizes(MIB, None), &[]), NumaError::Memory { .. }));
        let unaligned = make(&sizes(MIB + 1, Some(MIB - 1)), &[]);
        assert_eq!(unaligned, NumaError::Unaligned { node: 0, bytes: MIB + 1, page: 4096 });
        assert_eq!(make(&two, &[(0, 2, 20)]), NumaError::NoNode { node: 2, nodes: 2 });
        for (source, destination, distance) in [(0, 1, 9), (0, 1, 10), (0, 1, 256), (1, 1, 11)] {
            let refused = make(&two, &[(source, destination, distance)]);
            assert_eq!(refused, NumaError::Distance { from: source, to: destination, distance });
        }
        let asymmetric = make(&two, &[(0, 1, 20), (1, 0, 21)]);
        let expected = NumaError::Asymmetric { from: 1, to: 0, first: 20, second: 21 };
        assert_eq!(asymmetric, expected);
    }
}
