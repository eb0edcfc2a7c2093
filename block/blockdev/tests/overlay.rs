//! Overlays.

use block_graph::{AllowAll, OpenContext, OpenFlags, Options, Secrets, WriteFlags, ZeroFlags};
use io_loop::{IoBuffer, block_on};
use std::sync::Arc;

#[test]
fn what_is_written_to_a_temporary_overlay_goes_with_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let content: Vec<u8> = (0..300_000u32).map(|n| (n / 512 + n % 251) as u8).collect();
    std::fs::write(file.path(), &content).unwrap();
    let registry = Arc::new(blockdev::registry());
    let context = OpenContext::new(registry, Arc::new(Secrets::default()), Arc::new(AllowAll));
    block_on(async {
        let name = file.path().to_str().unwrap();
        let image =
            context.open_filename(name, Options::with("driver", "raw"), OpenFlags::READ).await.unwrap();
        let disk = blockdev::overlay::temporary(&context, image).await.unwrap();
        assert_eq!(disk.len(), content.len().next_multiple_of(512) as u64);
        let mut expected = content.clone();
        for (at, len) in [(1000, 1), (65_000, 2_000), (0, 4_096), (299_000, 1_000)] {
            let bytes = vec![at as u8 | 1; len];
            disk.write(at as u64, &IoBuffer::from(&bytes[..]).into_io(), WriteFlags::empty()).await.unwrap();
            expected[at..at + len].copy_from_slice(&bytes);
        }
        disk.write_zeroes(100_000, 70_000, ZeroFlags::MAY_UNMAP).await.unwrap();
        expected[100_000..170_000].fill(0);
        disk.flush().await.unwrap();
        let mut found = IoBuffer::zeroed(content.len());
        disk.read(0, &found.io()).await.unwrap();
        assert!(found.bytes() == expected);
        disk.close().await.unwrap();
    });
    assert!(std::fs::read(file.path()).unwrap() == content);
}
