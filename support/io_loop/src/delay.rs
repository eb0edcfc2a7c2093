//! Waiting for a time, and for no longer than a time.

use crate::local_loop::current;
use crate::timer::Sleep;
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

/// Is ready after `time`.
pub async fn sleep(time: Duration) {
    // What is too far to be an instant never comes.
    match Instant::now().checked_add(time) {
        Some(at) => Sleep::new(current().timers.clone(), at).await,
        None => std::future::pending().await,
    }
}

/// What `future` gives, if it does within `time`.
pub async fn timeout<T>(time: Duration, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut sleep) = (pin!(future), pin!(sleep(time)));
    std::future::poll_fn(|context| {
        if let Poll::Ready(value) = future.as_mut().poll(context) {
            return Poll::Ready(Some(value));
        }
        sleep.as_mut().poll(context).map(|()| None)
    })
    .await
}
