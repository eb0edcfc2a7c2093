//! Fetching over HTTP into memory, bounded and checked.

use std::io::Read;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::{Progress, StoreError};

/// How often a transfer that breaks off is taken up again.
const TRIES: u32 = 4;
const CHUNK: usize = 64 << 10;

/// What a file must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) size: u64,
    /// Lower-case hexadecimal digits.
    pub(crate) sha256: String,
}

/// A client for one mirror. Proxies come from the environment (`http_proxy`, `https_proxy`, `no_proxy`).
pub(crate) struct Mirror<'a> {
    agent: ureq::Agent,
    base: String,
    progress: &'a dyn Progress,
}

impl<'a> Mirror<'a> {
    pub(crate) fn new(base: &str, progress: &'a dyn Progress) -> Result<Self, StoreError> {
        let base = base.trim_end_matches('/').to_owned();
        let host = base.strip_prefix("http://").or_else(|| base.strip_prefix("https://"));
        if host.is_none_or(|host| host.is_empty() || host.starts_with('/')) {
            return Err(StoreError::BadMirror { url: base });
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_recv_body(Some(Duration::from_secs(1800)))
            .user_agent(concat!("vireo/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Ok(Self { agent, base, progress })
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.base)
    }

    /// Fetches `path`, of `limit` bytes at most.
    pub(crate) fn get(&self, path: &str, what: &str, limit: u64) -> Result<Vec<u8>, StoreError> {
        self.transfer(&self.url(path), what, None, limit)
    }

    /// Fetches `path` and checks it.
    pub(crate) fn get_checked(
        &self,
        path: &str,
        what: &str,
        expected: &Expected,
        limit: u64,
    ) -> Result<Vec<u8>, StoreError> {
        let url = self.url(path);
        if expected.size > limit {
            return Err(StoreError::TooLarge { what: url, limit });
        }
        let bytes = self.transfer(&url, what, Some(expected.size), expected.size)?;
        check(&url, &bytes, expected)?;
        Ok(bytes)
    }

    fn transfer(&self, url: &str, what: &str, total: Option<u64>, limit: u64) -> Result<Vec<u8>, StoreError> {
        self.progress.begin(what, total);
        let mut bytes = Vec::new();
        let mut reason = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(250 << attempt));
            }
            match self.attempt(url, &mut bytes, limit) {
                Ok(()) => {
                    self.progress.end();
                    return Ok(bytes);
                }
                Err(Attempt::Final(error)) => {
                    self.progress.end();
                    return Err(error);
                }
                Err(Attempt::Again(error)) => reason = error,
            }
        }
        self.progress.end();
        Err(StoreError::Fetch { url: url.to_owned(), reason })
    }

    /// One request for what's missing in `bytes`.
    fn attempt(&self, url: &str, bytes: &mut Vec<u8>, limit: u64) -> Result<(), Attempt> {
        let mut request = self.agent.get(url);
        if !bytes.is_empty() {
            request = request.header("Range", format!("bytes={}-", bytes.len()));
        }
        let response = request.call().map_err(|error| Attempt::Again(error.to_string()))?;
        match response.status().as_u16() {
            200 => bytes.clear(),
            206 if continues_at(response.headers(), bytes.len()) => {}
            status @ (408 | 429 | 500..=599) => return Err(Attempt::Again(format!("status {status}"))),
            status => return Err(Attempt::Final(StoreError::NotThere { url: url.to_owned(), status })),
        }
        let announced = response.body().content_length();
        let start = bytes.len() as u64;
        let too_large = || Attempt::Final(StoreError::TooLarge { what: url.to_owned(), limit });
        if announced.is_some_and(|length| start.saturating_add(length) > limit) {
            return Err(too_large());
        }
        let mut reader = response.into_body().into_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = reader.read(&mut chunk).map_err(|error| Attempt::Again(error.to_string()))?;
            if read == 0 {
                break;
            }
            if (bytes.len() + read) as u64 > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk[..read]);
            self.progress.advance(read as u64);
        }
        match announced {
            Some(length) if start + length > bytes.len() as u64 => {
                Err(Attempt::Again("the connection was closed early".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a partial answer starts where it should.
fn continues_at(headers: &ureq::http::HeaderMap, position: usize) -> bool {
    let range = headers.get("content-range").and_then(|value| value.to_str().ok());
    range.is_some_and(|range| range.starts_with(&format!("bytes {position}-")))
}

enum Attempt {
    /// Worth another try.
    Again(String),
    /// Not to be helped.
    Final(StoreError),
}

/// The SHA-256 in hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check(url: &str, bytes: &[u8], expected: &Expected) -> Result<(), StoreError> {
    let damaged = |what, found, expected| StoreError::Damaged { url: url.to_owned(), what, found, expected };
    if bytes.len() as u64 != expected.size {
        return Err(damaged("its length", bytes.len().to_string(), expected.size.to_string()));
    }
    let found = sha256(bytes);
    if found != expected.sha256 {
        return Err(damaged("its SHA-256", found, expected.sha256.clone()));
    }
    Ok(())
}
