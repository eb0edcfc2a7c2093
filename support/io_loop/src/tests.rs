use crate::*;
use futures_util::future::join_all;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

fn temporary(bytes: &[u8]) -> std::os::fd::OwnedFd {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.into()
}

#[test]
fn tasks_timers_and_threads_run_beside_each_other() {
    let count = Arc::new(AtomicUsize::new(0));
    let result = block_on(async {
        let tasks: Vec<_> = (0..100u64)
            .map(|n| {
                let count = count.clone();
                spawn(async move {
                    sleep(Duration::from_millis(n % 7)).await;
                    count.fetch_add(1, Ordering::Relaxed);
                    let squared = offload(move || n * n).await;
                    blocking(move || squared + 1).await
                })
            })
            .collect();
        join_all(tasks).await
    });
    assert_eq!(result, (0..100).map(|n| n * n + 1).collect::<Vec<u64>>());
    assert_eq!(count.load(Ordering::Relaxed), 100);
}

#[test]
fn a_dropped_task_ends() {
    let count = Arc::new(AtomicUsize::new(0));
    block_on(async {
        let inner = count.clone();
        let task = spawn(async move {
            sleep(Duration::from_millis(20)).await;
            inner.fetch_add(1, Ordering::Relaxed);
        });
        yield_now().await;
        drop(task);
        sleep(Duration::from_millis(60)).await;
    });
    assert_eq!(count.load(Ordering::Relaxed), 0);
}

#[test]
fn another_thread_wakes_the_loop() {
    let (tell, told) = mpsc::channel::<std::task::Waker>();
    let thread = thread::spawn(move || {
        let waker = told.recv().unwrap();
        thread::sleep(Duration::from_millis(30));
        waker.wake();
    });
    let start = Instant::now();
    block_on(async {
        spawn(async move {
            let mut told = false;
            std::future::poll_fn(|context| {
                if std::mem::replace(&mut told, true) {
                    return std::task::Poll::Ready(());
                }
                tell.send(context.waker().clone()).unwrap();
                std::task::Poll::Pending
            })
            .await;
        })
        .await;
    });
    assert!(start.elapsed() >= Duration::from_millis(30));
    thread.join().unwrap();
}

fn files_are_read_and_written(aio: Aio) {
    let file = IoFile::new(temporary(&[1; 10_000]), aio);
    block_on(async {
        let mut buffer = IoBuffer::zeroed(20_000);
        assert_eq!(file.read_at(4_000, &buffer.io()).await.unwrap(), 6_000);
        assert!(buffer.bytes()[..6_000].iter().all(|b| *b == 1));
        assert!(buffer.bytes()[6_000..].iter().all(|b| *b == 0));

        // More pieces than a system call takes.
        let pieces = (0..3_000u32).map(|n| IoBuffer::from(&n.to_le_bytes()[..]).into_io());
        let many = IoVec::chain(pieces);
        file.write_at(7, &many, true).await.unwrap();
        file.sync().await.unwrap();
        let mut back = IoBuffer::zeroed(many.len());
        assert_eq!(file.read_at(7, &back.io()).await.unwrap(), many.len());
        assert_eq!(back.bytes(), many.to_vec());

        let error = file.read_at(u64::MAX - 1, &back.io()).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert_eq!(file.call(|fd| Ok(rustix::fs::fstat(fd)?.st_size)).await.unwrap(), 12_007);
    });
}

#[test]
fn files_are_read_and_written_by_the_ring() {
    // A host without rings takes threads; the other test is then this one.
    files_are_read_and_written(Aio::Ring);
}

#[test]
fn files_are_read_and_written_by_threads() {
    files_are_read_and_written(Aio::Threads);
}

#[test]
fn dropped_reads_leave_no_trace() {
    let file = IoFile::new(temporary(&[5; 1 << 20]), Aio::Ring);
    thread::spawn(move || {
        block_on(async {
            for _ in 0..200 {
                let mut buffer = IoBuffer::zeroed(1 << 20);
                let io = buffer.io();
                let read = file.read_at(0, &io);
                assert!(timeout(Duration::ZERO, read).await.is_none_or(|read| read.unwrap() == 1 << 20));
            }
        });
    })
    .join()
    .unwrap();
}

#[test]
fn streams_carry_bytes_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    block_on(async {
        let listener = Listener::bind_unix(&path).unwrap();
        let server = spawn(async move {
            let stream = listener.accept().await.unwrap();
            let mut bytes = vec![0; 1 << 20];
            stream.read_exact(&mut bytes).await.unwrap();
            stream.write_all_vec(&IoBuffer::from(&bytes[..]).into_io()).await.unwrap();
            assert_eq!(stream.read(&mut bytes).await.unwrap(), 0);
        });
        let stream = Stream::connect_unix(&path).await.unwrap();
        let waiting = timeout(Duration::from_millis(5), stream.read(&mut [0; 1])).await;
        assert!(waiting.is_none(), "nothing was sent");
        let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n * 7 % 251) as u8).collect();
        let sender = spawn({
            let (stream, bytes) = (stream.clone(), bytes.clone());
            async move { stream.write_all(&bytes).await.unwrap() }
        });
        let mut back = IoBuffer::zeroed(1 << 20);
        stream.read_exact_vec(&back.io()).await.unwrap();
        assert_eq!(back.bytes(), bytes);
        sender.await;
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        server.await;
    });
}
