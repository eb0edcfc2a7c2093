//! `-L`: what another server exports.

use crate::Failure;
use crate::arguments::Arguments;
use crate::objects::Objects;
use nbd::client::handshake::ListedExport;
use nbd::client::{Address, dial_list};
use nbd::proto::{DEFAULT_PORT, HeaderMode, TransmissionFlags};
use std::process::ExitCode;

/// Flags with qemu-nbd's names for them, in the order of their bits.
const NAMES: [(TransmissionFlags, &str); 11] = [
    (TransmissionFlags::READ_ONLY, "readonly"),
    (TransmissionFlags::SEND_FLUSH, "flush"),
    (TransmissionFlags::SEND_FUA, "fua"),
    (TransmissionFlags::ROTATIONAL, "rotational"),
    (TransmissionFlags::SEND_TRIM, "trim"),
    (TransmissionFlags::SEND_WRITE_ZEROES, "zeroes"),
    (TransmissionFlags::SEND_DF, "df"),
    (TransmissionFlags::CAN_MULTI_CONN, "multi"),
    (TransmissionFlags::SEND_RESIZE, "resize"),
    (TransmissionFlags::SEND_CACHE, "cache"),
    (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
];

/// Prints what a server exports.
pub(crate) async fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let objects = Objects::new(arguments)?;
    let host = arguments.bind.clone().unwrap_or_else(|| "0.0.0.0".to_owned());
    let address = match &arguments.socket {
        Some(path) => Address::Unix(path.into()),
        None => {
            let port = arguments.port.clone().unwrap_or_else(|| DEFAULT_PORT.to_string());
            Address::Tcp { host: host.clone(), port }
        }
    };
    let tls = match &arguments.tls_creds {
        Some(id) => Some((objects.client(id)?, arguments.tls_hostname.clone().unwrap_or(host))),
        None => None,
    };
    let exports = dial_list(&address, tls.as_ref()).await?;
    print!("{}", text(&exports));
    Ok(ExitCode::SUCCESS)
}

fn text(exports: &[ListedExport]) -> String {
    let mut text = format!("exports available: {}\n", exports.len());
    for export in exports {
        text.push_str(&format!(" export: '{}'\n", export.name));
        if !export.description.is_empty() {
            text.push_str(&format!("  description: {}\n", export.description));
        }
        if let Some(info) = export.info {
            let names: String = NAMES
                .iter()
                .filter(|(flag, _)| info.flags.contains(*flag))
                .map(|(_, name)| format!(" {name}"))
                .collect();
            text.push_str(&format!("  size:  {}\n  flags: {:#x} ({names} )\n", info.size, info.flags.bits()));
        }
        if let Some(sizes) = export.sizes {
            text.push_str(&format!(
                "  min block: {}\n  opt block: {}\n  max block: {}\n",
                sizes.minimum, sizes.preferred, sizes.maximum
            ));
        }
        let bits = if export.mode == HeaderMode::Extended { 64 } else { 32 };
        text.push_str(&format!("  transaction size: {bits}-bit\n"));
        if !export.contexts.is_empty() {
            text.push_str(&format!("  available meta contexts: {}\n", export.contexts.len()));
            for context in &export.contexts {
                text.push_str(&format!("   {context}\n"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::text;
    use nbd::client::handshake::ListedExport;
    use nbd::proto::{BlockSizes, ExportInfo, HeaderMode, TransmissionFlags};

    #[test]
    fn lists_look_as_qemu_nbds() {
        let flags =
            TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_FLUSH;
        let export = ListedExport {
            name: "x".into(),
            description: "words".into(),
            info: Some(ExportInfo { size: 4096, flags }),
            sizes: Some(BlockSizes::DEFAULT),
            contexts: vec!["base:allocation".into()],
            mode: HeaderMode::Extended,
        };
        let expected = "exports available: 1\n export: 'x'\n  description: words\n  size:  4096\n  \
                        flags: 0x7 ( readonly flush )\n  min block: 1\n  opt block: 4096\n  max block: 33554432\n  \
                        transaction size: 64-bit\n  available meta contexts: 1\n   base:allocation\n";
        assert_eq!(text(&[export]), expected);
    }
}
