//! What a disk holds, and the writes that make it so.

/// Bytes of the disks.
pub(crate) const SIZE: usize = 6 << 20;

/// One write.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Write {
    at: usize,
    len: usize,
    /// `None` writes zeros without data.
    byte: Option<u8>,
    compressed: bool,
}

impl Write {
    /// As a command of qemu-io.
    pub(crate) fn command(&self) -> String {
        let Self { at, len, byte, compressed } = *self;
        match byte {
            None => format!("write -q -z -u {at} {len}"),
            Some(byte) if compressed => format!("write -q -c -P {byte} {at} {len}"),
            Some(byte) => format!("write -q -P {byte} {at} {len}"),
        }
    }

    pub(crate) fn apply(&self, content: &mut [u8]) {
        content[self.at..self.at + self.len].fill(self.byte.unwrap_or(0));
    }
}

const fn data(at: usize, len: usize, byte: u8) -> Write {
    Write { at, len, byte: Some(byte), compressed: false }
}

const fn zeros(at: usize, len: usize) -> Write {
    Write { at, len, byte: None, compressed: false }
}

/// The writes of the maker: up to `compressed` compressed clusters (whole ones of `cluster` bytes), one of which is then
/// written over in part; parts of clusters and whole ones, zeros over data and data over zeros.
pub(crate) fn first(cluster: usize, compressed: usize) -> Vec<Write> {
    let mut all = Vec::new();
    if compressed > 0 {
        let begin = 4 << 20;
        for index in 0..((512 << 10) / cluster).clamp(1, compressed) {
            let (at, byte) = (begin + index * cluster, 6 + index as u8);
            all.push(Write { at, len: cluster, byte: Some(byte), compressed: true });
        }
        all.push(data(begin + 300, 700, 60));
    }
    all.extend([
        data(0, 100_000, 1),
        data(1 << 20, 70_000, 2),
        data(3_000_000, 1_000_000, 3),
        data(SIZE - 5000, 5000, 4),
        zeros(3_100_000, 200_000),
        data(3_150_000, 1000, 5),
    ]);
    all
}

/// The writes of the maker after a snapshot.
pub(crate) fn second() -> Vec<Write> {
    vec![data(50_000, 80_000, 70), zeros(3_400_000, 100_000), data((4 << 20) + 1000, 3000, 71)]
}

/// The writes of the other one.
pub(crate) fn third() -> Vec<Write> {
    vec![
        data(10_000, 20_000, 80),
        zeros((1 << 20) + 10_000, 40_000),
        data(2 << 20, 300_000, 81),
        data(SIZE - 600_000, 500_000, 82),
    ]
}
