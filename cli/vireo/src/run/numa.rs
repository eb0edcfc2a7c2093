//! `--numa node,…` and `--numa dist,…`

use super::size;
use super::words::split;
use guest_memory::NodePolicy;
use machine::{NodeDistance, NodeSpec, NumaSpec};
use placement::CpuList;

/// What `--numa` takes.
const ACCEPTED: &str = "node[,nodeid=N][,cpus=LIST][,memory=SIZE][,host-nodes=LIST]\
                        [,policy=bind|preferred|interleave], and dist,src=N,dst=N,val=DISTANCE";

/// One word on the guest's NUMA nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NumaWord {
    /// A node, perhaps with its number.
    Node(Option<usize>, NodeSpec),
    /// A distance.
    Distance(NodeDistance),
}

/// Reads one word.
pub(crate) fn parse(text: &str) -> Result<NumaWord, String> {
    let words = split(text);
    match words.split_first() {
        Some((kind, words)) if kind == "node" => parse_node(words),
        Some((kind, words)) if kind == "dist" => parse_distance(words),
        _ => Err(format!("{text:?} is neither a NUMA node nor a distance; accepted are {ACCEPTED}")),
    }
}

fn parse_node(words: &[String]) -> Result<NumaWord, String> {
    let mut node = NodeSpec::default();
    let mut number = None;
    let mut policy = None;
    let mut last = "";
    for word in words {
        // `cpus=0-1,4`: what follows a list without a key continues it.
        let (key, value) = match word.split_once('=') {
            Some(pair) => pair,
            None if matches!(last, "cpus" | "host-nodes") => (last, word.as_str()),
            None => return Err(format!("{word:?} is no option of a NUMA node; accepted are {ACCEPTED}")),
        };
        let wrong = |accepted: &str| format!("{key}={value} is not possible; accepted is {accepted}");
        let list = |text: &str| text.parse::<CpuList>().map_err(|_| wrong("a list of numbers, such as 0-3"));
        match key {
            "nodeid" => {
                number = Some(value.parse().map_err(|_| wrong("the node's number, counted from 0"))?);
            }
            "cpus" => node.vcpus.extend(list(value)?.iter()),
            "host-nodes" => node.host_nodes.extend(list(value)?.iter()),
            "memory" | "mem" => node.memory = Some(size::parse(value, 1 << 20)?),
            "policy" => {
                policy = Some(match value {
                    "bind" => NodePolicy::Bind,
                    "preferred" => NodePolicy::Preferred,
                    "interleave" => NodePolicy::Interleave,
                    _ => return Err(wrong("bind, preferred or interleave")),
                });
            }
            _ => return Err(format!("{key:?} is no option of a NUMA node; accepted are {ACCEPTED}")),
        }
        last = key;
    }
    if policy.is_some() && node.host_nodes.is_empty() {
        return Err("policy= says how host-nodes= are used, and there are none".into());
    }
    node.policy = policy.unwrap_or_default();
    Ok(NumaWord::Node(number, node))
}

fn parse_distance(words: &[String]) -> Result<NumaWord, String> {
    let [mut source, mut destination, mut distance] = [None; 3];
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("{word:?} is no option of a NUMA distance; accepted are {ACCEPTED}"));
        };
        let number = value.parse::<u32>();
        let number = number.map_err(|_| format!("{key}={value} is not possible; accepted is a number"))?;
        match key {
            "src" => source = Some(number),
            "dst" => destination = Some(number),
            "val" => distance = Some(number),
            _ => return Err(format!("{key:?} is no option of a NUMA distance; accepted are {ACCEPTED}")),
        }
    }
    match (source, destination, distance) {
        (Some(source), Some(destination), Some(distance)) => {
            Ok(NumaWord::Distance(NodeDistance { source, destination, distance }))
        }
        _ => Err("a NUMA distance needs src=N, dst=N and val=DISTANCE".into()),
    }
}

/// Puts the words together.
///
/// # Errors
/// The nodes' numbers are not 0 and on, each once.
pub(crate) fn spec(words: &[NumaWord]) -> Result<NumaSpec, String> {
    let mut spec = NumaSpec::default();
    let mut nodes = Vec::new();
    for word in words {
        match word {
            NumaWord::Node(number, node) => nodes.push((number.unwrap_or(nodes.len()), node)),
            NumaWord::Distance(distance) => spec.distances.push(*distance),
        }
    }
    nodes.sort_by_key(|(number, _)| *number);
    for (expected, (number, node)) in nodes.into_iter().enumerate() {
        if number != expected {
            return Err(format!(
                "NUMA nodes are numbered from 0 without gaps; there is no single node {}",
                expected.min(number)
            ));
        }
        spec.nodes.push(node.clone());
    }
    Ok(spec)
}

/// The memory of all nodes together, if one says how much it has.
pub(crate) fn memory(spec: &NumaSpec) -> Option<u64> {
    let said = spec.nodes.iter().filter_map(|node| node.memory);
    said.fold(None, |sum: Option<u64>, memory| Some(sum.unwrap_or(0).saturating_add(memory)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_people_write() {
        let words = [
            "node,nodeid=1,cpus=2-3,memory=1G,host-nodes=0,2,policy=interleave",
            "node,nodeid=0,cpus=0,1,mem=512",
            "dist,src=0,dst=1,val=21",
        ];
        let words: Vec<_> = words.iter().map(|text| parse(text).unwrap()).collect();
        let spec = spec(&words).unwrap();
        let first = NodeSpec { vcpus: vec![0, 1], memory: Some(512 << 20), ..NodeSpec::default() };
        let second = NodeSpec {
            vcpus: vec![2, 3],
            memory: Some(1 << 30),
            host_nodes: vec![0, 2],
            policy: NodePolicy::Interleave,
        };
        let distances = vec![NodeDistance { source: 0, destination: 1, distance: 21 }];
        assert_eq!(memory(&spec), Some(1536 << 20));
        assert_eq!(spec, NumaSpec { nodes: vec![first, second], distances });
        assert_eq!(memory(&NumaSpec::default()), None);
    }

    #[test]
    fn what_is_no_node_is_refused() {
        for text in [
            "",
            "nodes",
            "node,x",
            "node,x=1",
            "node,cpus=",
            "node,cpus=3-1",
            "node,memory=lots",
            "node,host-nodes=a",
            "node,host-nodes=0,policy=best",
            "node,policy=bind",
            "dist",
            "dist,src=0,dst=1",
            "dist,src=0,dst=1,val=x",
            "dist,src=0,dst=1,val=20,x=1",
            "node,nodeid=-1",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        for numbers in [&["1"][..], &["0", "0"], &["0", "2"]] {
            let word = |number: &&str| parse(&format!("node,nodeid={number}")).unwrap();
            let words: Vec<_> = numbers.iter().map(word).collect();
            assert!(spec(&words).is_err(), "{numbers:?}");
        }
    }
}
