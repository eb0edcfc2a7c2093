//! Raw images and parts of files, and disks of nothing.

use block_graph::{
    AllowAll, Errno, Error, NodeRef, OpenContext, OpenFlags, Options, Registry, Secrets, Truncate,
};
use block_graph::{Value, WriteFlags, ZeroFlags};
use io_loop::{IoBuffer, block_on};
use std::fs;
use std::sync::Arc;

fn context() -> OpenContext {
    let mut registry = Registry::new();
    block_file::register(&mut registry);
    block_filters::register(&mut registry);
    OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll))
}

async fn open(options: &[(&str, Value)]) -> Result<NodeRef, Error> {
    let options: Options = options.iter().cloned().collect();
    context().open(options, OpenFlags::WRITE).await
}

async fn read(node: &NodeRef, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = IoBuffer::from(&vec![0xee; len][..]);
    node.read(offset, &buffer.io()).await.unwrap();
    buffer.bytes().to_vec()
}

#[test]
fn a_part_of_a_file_is_a_disk() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..8192_u32).map(|index| (index / 16) as u8).collect();
    fs::write(&file, &bytes).unwrap();
    let name = || ("file.filename", Value::from(file.path().to_str().unwrap()));
    let raw = || ("driver", Value::from("raw"));
    block_on(async {
        let whole = open(&[("filename", Value::from(file.path().to_str().unwrap()))]).await.unwrap();
        assert_eq!((whole.driver().format_name(), whole.len()), ("raw", 8192));
        assert_eq!(whole.filename().as_deref(), file.path().to_str());
        drop(whole);

        let part = open(&[raw(), name(), ("offset", "1k".into()), ("size", 2048.into())]).await.unwrap();
        assert_eq!((part.len(), part.filename()), (2048, None));
        assert_eq!(read(&part, 10, 2038).await, bytes[1034..3072]);
        part.write(0, &IoBuffer::from(&[1; 8][..]).into_io(), WriteFlags::FUA).await.unwrap();
        part.write_zeroes(2040, 8, ZeroFlags::empty()).await.unwrap();
        let beyond = part.write(2041, &IoBuffer::from(&[1; 8][..]).into_io(), WriteFlags::empty()).await;
        assert!(beyond.is_err(), "it ends before its file");
        let status = part.block_status(512, 4096, true).await.unwrap();
        assert!(status.recurse && status.eof && status.len == 1536);
        assert!(status.at.is_some_and(|(node, at)| at == 1536 && node.driver().format_name() == "file"));
        let fixed = part.truncate(4096, Truncate::default()).await.unwrap_err();
        assert_eq!(fixed.to_string(), "Cannot resize fixed-size raw disks");
        drop(part);
        let now = fs::read(&file).unwrap();
        assert_eq!(
            (&now[1024..1032], &now[3064..3072], &now[3072..]),
            (&[1; 8][..], &[0; 8][..], &bytes[3072..])
        );

        let rest = open(&[raw(), name(), ("offset", 8000.into())]).await.unwrap();
        assert_eq!(rest.len(), 192);
        rest.truncate(1000, Truncate::default()).await.unwrap();
        assert_eq!(fs::metadata(&file).unwrap().len(), 9000);
        drop(rest);

        let refused = |error: Result<NodeRef, Error>| error.unwrap_err().to_string();
        let far = refused(open(&[raw(), name(), ("offset", 9001.into())]).await);
        assert_eq!(far, "Offset (9001) cannot be greater than size of the containing file (9000)");
        let long = refused(open(&[raw(), name(), ("offset", 512.into()), ("size", 8704.into())]).await);
        assert!(long.starts_with("The sum of offset (512) and size (8704) has to be smaller"), "{long}");
        let odd = refused(open(&[raw(), name(), ("size", 100.into())]).await);
        assert_eq!(odd, "Specified size is not multiple of 512");
    });
}

#[test]
fn null_disks_have_nothing() {
    block_on(async {
        let name = ("filename", Value::from("null-co://"));
        let raw = open(&[name]).await.unwrap();
        assert_eq!((raw.driver().format_name(), raw.len()), ("raw", 1 << 30));
        let options = [
            ("driver", "null-aio".into()),
            ("size", "3M".into()),
            ("read-zeroes", "on".into()),
            ("latency-ns", 1_000_000.into()),
        ];
        let node = open(&options).await.unwrap();
        let before = std::time::Instant::now();
        assert_eq!(read(&node, 1 << 20, 100).await, [0; 100]);
        assert!(before.elapsed().as_micros() >= 1000);
        assert!(node.block_status(0, 5 << 20, true).await.unwrap().zero);
        let wrong = open(&[("driver", "null-co".into()), ("filename", "null-co://x".into())]).await;
        let message = "The only allowed filename for this driver is 'null-co://'";
        assert_eq!(wrong.unwrap_err().to_string(), message);
    });
}

/// A format that begins with "LOOK".
struct Look;

#[block_graph::async_trait(?Send)]
impl block_graph::DriverKind for Look {
    fn name(&self) -> &'static str {
        "look"
    }

    fn probe(&self, head: &[u8], _: &str) -> u8 {
        if head.starts_with(b"LOOK") { 100 } else { 0 }
    }

    async fn open(
        &self,
        _: &OpenContext,
        _: &mut Options,
        _: OpenFlags,
    ) -> Result<Box<dyn block_graph::Driver>, Error> {
        Err(Error::unsupported("look is only looked for"))
    }
}

#[test]
fn an_image_that_was_taken_for_raw_stays_raw() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), [0; 4096]).unwrap();
    let name = file.path().to_str().unwrap();
    let mut registry = Registry::new();
    block_file::register(&mut registry);
    block_filters::register(&mut registry);
    registry.add(Look);
    let context = OpenContext::new(Arc::new(registry), Arc::new(Secrets::default()), Arc::new(AllowAll));
    let bytes = |bytes: &[u8]| IoBuffer::from(bytes).into_io();
    block_on(async {
        let node = context.open_filename(name, Options::new(), OpenFlags::WRITE).await.unwrap();
        let mut sector = [0; 512];
        node.write(0, &bytes(&sector), WriteFlags::empty()).await.unwrap();
        node.write(512, &bytes(b"LOOK"), WriteFlags::empty()).await.unwrap();
        sector[..4].copy_from_slice(b"LOOK");
        let refused = node.write(0, &bytes(&sector), WriteFlags::empty()).await.unwrap_err();
        assert_eq!(refused.errno(), Errno::NOT_PERMITTED);
        node.write(0, &bytes(b"L"), WriteFlags::empty()).await.unwrap();
        assert!(node.write(1, &bytes(b"OOK"), WriteFlags::empty()).await.is_err(), "in two parts");
        node.close().await.unwrap();
        drop(node);
        let options = Options::with("driver", "raw");
        let node = context.open_filename(name, options, OpenFlags::WRITE).await.unwrap();
        node.write(0, &bytes(&sector), WriteFlags::empty()).await.unwrap();
        node.close().await.unwrap();
    });
}
