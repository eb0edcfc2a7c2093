//! Reading and writing guest data where they are in the file, through the cipher if there is one.

use super::crypt::{Crypt, SECTOR};
use super::state::Qcow2;
use block_graph::{Result, WriteFlags};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use io_loop::{IoBuffer, IoVec};
use luks::{PART, PARTS_AT_ONCE};

/// The parts that a range of the file is worked on in: each begins and ends with a sector but for the first and last.
fn parts(start: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = start + len;
    let first = start / SECTOR * SECTOR;
    (first..end).step_by(PART as usize).map(move |at| (at.max(start), (at + PART).min(end)))
}

impl Qcow2 {
    /// Reads data of guest offset `guest` that are at `host`.
    pub(crate) async fn read_host(&self, host: u64, guest: u64, into: &IoVec) -> Result<()> {
        self.data().driver().debug_event("read_aio");
        let Some(crypt) = &self.crypt else { return self.data().read(host, into).await };
        let cipher = crypt.cipher()?;
        let reads = parts(host, into.len() as u64).map(|(from, to)| {
            let cipher = &cipher;
            let part = into.slice((from - host) as usize..(to - host) as usize);
            async move {
                let start = from / SECTOR * SECTOR;
                let mut buffer = IoBuffer::scratch((to.next_multiple_of(SECTOR) - start) as usize);
                self.data().read(start, &buffer.io()).await?;
                let first = crypt.sector(start, guest + from - host);
                let buffer = cipher.decrypt_buffer(first, buffer).await;
                let skip = (from - start) as usize;
                part.copy_from(0, &buffer.bytes()[skip..skip + part.len()]);
                Ok(())
            }
        });
        stream::iter(reads).buffer_unordered(PARTS_AT_ONCE).try_collect::<()>().await
    }

    /// Writes data of guest offset `guest` to `host`.
    pub(crate) async fn write_host(&self, host: u64, guest: u64, from: &IoVec) -> Result<()> {
        self.data().driver().debug_event("write_aio");
        let Some(crypt) = &self.crypt else {
            return self.data().write(host, from, WriteFlags::empty()).await;
        };
        let end = host + from.len() as u64;
        let _writing = crypt.writing.lock(host / SECTOR * SECTOR..end.next_multiple_of(SECTOR)).await;
        let writes = parts(host, from.len() as u64).map(|(start, end)| {
            let data = from.slice((start - host) as usize..(end - host) as usize);
            self.write_sectors(crypt, start, guest + start - host, data)
        });
        stream::iter(writes).buffer_unordered(PARTS_AT_ONCE).try_collect::<()>().await
    }

    /// Writes data, and around them what their first and last sectors have.
    async fn write_sectors(&self, crypt: &Crypt, host: u64, guest: u64, data: IoVec) -> Result<()> {
        let cipher = crypt.cipher()?;
        let (start, end) = (host / SECTOR * SECTOR, (host + data.len() as u64).next_multiple_of(SECTOR));
        let first = crypt.sector(start, guest);
        let mut buffer = IoBuffer::scratch((end - start) as usize);
        let whole = start == host && end - start == data.len() as u64;
        if !whole {
            self.data().read(start, &buffer.io()).await?;
            cipher.decrypt(first, buffer.bytes_mut());
        }
        let at = (host - start) as usize;
        data.copy_to(0, &mut buffer.bytes_mut()[at..at + data.len()]);
        let buffer = cipher.encrypt_buffer(first, buffer).await;
        self.data().write(start, &buffer.into_io(), WriteFlags::empty()).await
    }
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn parts_are_whole_sectors_but_at_the_ends() {
        assert_eq!(parts(700, 100).collect::<Vec<_>>(), [(700, 800)]);
        let long: Vec<_> = parts(700, 300_000).collect();
        assert_eq!(long, [(700, 131_584), (131_584, 262_656), (262_656, 300_700)]);
    }
}
