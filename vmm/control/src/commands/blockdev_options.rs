//! The options that nodes are opened with: what `blockdev-add` takes, by drivers.
//!
//! The types here are for the check of what clients send and for introspection; what is sent goes to the block layer as
//! it is, which looks at values and at what goes together.

#![allow(dead_code, reason = "only the types are looked at")]

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::borrow::Cow;

/// Options of a node, checked as [`BlockdevOptions`].
#[derive(Debug, Clone, Deserialize)]
#[serde(transparent)]
pub(super) struct Blockdev(pub(super) Map<String, Value>);

impl JsonSchema for Blockdev {
    fn schema_name() -> Cow<'static, str> {
        "BlockdevOptions".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        BlockdevOptions::json_schema(generator)
    }
}

/// A node: its options, or the name of one that is there.
struct BlockdevRef;

/// The same, or `null` for none.
struct BlockdevRefOrNull;

impl JsonSchema for BlockdevRef {
    fn schema_name() -> Cow<'static, str> {
        "BlockdevRef".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let options = generator.subschema_for::<Blockdev>();
        json_schema!({ "anyOf": [options, { "type": "string" }] })
    }
}

impl JsonSchema for BlockdevRefOrNull {
    fn schema_name() -> Cow<'static, str> {
        "BlockdevRefOrNull".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let options = generator.subschema_for::<Blockdev>();
        json_schema!({ "anyOf": [options, { "type": "string" }, { "type": ["null"] }] })
    }
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct BlockdevOptions {
    node_name: Option<String>,
    discard: Option<Discard>,
    cache: Option<Cache>,
    read_only: Option<bool>,
    auto_read_only: Option<bool>,
    force_share: Option<bool>,
    detect_zeroes: Option<DetectZeroes>,
    #[serde(flatten)]
    driver: Driver,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Discard {
    Ignore,
    Unmap,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum DetectZeroes {
    Off,
    On,
    Unmap,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Cache {
    direct: Option<bool>,
    no_flush: Option<bool>,
}

#[derive(JsonSchema)]
#[serde(tag = "driver", rename_all = "kebab-case")]
enum Driver {
    File(HostFile),
    #[serde(rename = "host_device")]
    HostDevice(HostFile),
    Raw(Raw),
    Qcow2(Qcow2),
    Luks(Luks),
    Nbd(Nbd),
    NullCo(NullDisk),
    NullAio(NullDisk),
    Throttle(Throttle),
    CopyOnRead(CopyOnRead),
    Compress(Filter),
    Blkdebug(Blkdebug),
    Quorum(Quorum),
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Aio {
    Threads,
    Native,
    #[serde(rename = "io_uring")]
    IoUring,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum OnOffAuto {
    Auto,
    On,
    Off,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct HostFile {
    filename: String,
    aio: Option<Aio>,
    aio_max_batch: Option<u64>,
    drop_cache: Option<bool>,
    locking: Option<OnOffAuto>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Raw {
    file: BlockdevRef,
    offset: Option<u64>,
    size: Option<u64>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Qcow2 {
    file: BlockdevRef,
    backing: Option<BlockdevRefOrNull>,
    data_file: Option<BlockdevRef>,
    lazy_refcounts: Option<bool>,
    pass_discard_request: Option<bool>,
    pass_discard_snapshot: Option<bool>,
    pass_discard_other: Option<bool>,
    discard_no_unref: Option<bool>,
    overlap_check: Option<OverlapCheck>,
    cache_size: Option<u64>,
    l2_cache_size: Option<u64>,
    l2_cache_entry_size: Option<u64>,
    refcount_cache_size: Option<u64>,
    cache_clean_interval: Option<u64>,
    encrypt: Option<Encryption>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum OverlapCheck {
    None,
    Constant,
    Cached,
    All,
}

#[derive(JsonSchema)]
#[serde(tag = "format", rename_all = "kebab-case")]
enum Encryption {
    Aes(Key),
    Luks(Key),
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Key {
    key_secret: Option<String>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Luks {
    file: BlockdevRef,
    header: Option<BlockdevRef>,
    key_secret: Option<String>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Nbd {
    server: NbdServer,
    export: Option<String>,
    tls_creds: Option<String>,
    tls_hostname: Option<String>,
    x_dirty_bitmap: Option<String>,
}

#[derive(JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
enum NbdServer {
    Inet { host: String, port: String },
    Unix { path: String },
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct NullDisk {
    size: Option<u64>,
    latency_ns: Option<u64>,
    read_zeroes: Option<bool>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Throttle {
    file: BlockdevRef,
    throttle_group: String,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct CopyOnRead {
    file: BlockdevRef,
    bottom: Option<String>,
}

#[derive(JsonSchema)]
struct Filter {
    file: BlockdevRef,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Blkdebug {
    image: BlockdevRef,
    config: Option<String>,
    inject_error: Option<Vec<InjectError>>,
    set_state: Option<Vec<SetState>>,
}

#[derive(JsonSchema)]
struct InjectError {
    event: String,
    state: Option<u64>,
    iotype: Option<String>,
    errno: Option<u64>,
    sector: Option<i64>,
    once: Option<bool>,
    immediately: Option<bool>,
}

#[derive(JsonSchema)]
struct SetState {
    event: String,
    state: Option<u64>,
    new_state: u64,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Quorum {
    children: Vec<BlockdevRef>,
    vote_threshold: u64,
    blkverify: Option<bool>,
    rewrite_corrupted: Option<bool>,
    read_pattern: Option<ReadPattern>,
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum ReadPattern {
    Quorum,
    Fifo,
}
