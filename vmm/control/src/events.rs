//! Events: what clients hear of unasked.

use crate::message;
use crate::outbox::Outbox;
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Something that clients hear of.
pub trait Event: Serialize + JsonSchema {
    /// Its name on the wire.
    const NAME: &'static str;
    /// How often it is sent at most for one [`Event::subject`]: a guest can make as many as it likes of some.
    const EVERY: Option<Duration> = None;

    /// What it is about, for those that are not sent as often as they occur.
    fn subject(&self) -> String {
        String::new()
    }
}

/// After this time it is of no account when an event was sent last.
const FORGOTTEN: Duration = Duration::from_secs(7200);

#[derive(Debug, Default)]
struct State {
    clients: Vec<Arc<Outbox>>,
    /// When events that are limited were sent last.
    sent: HashMap<(&'static str, String), Instant>,
    wakers: Vec<Waker>,
}

/// Sends events to all clients, from any thread, and wakes commands that wait for what they say.
#[derive(Debug, Default)]
pub struct Hub {
    state: Mutex<State>,
}

impl Hub {
    /// Sends an event.
    pub fn send<E: Event>(&self, event: &E) {
        let now = Instant::now();
        let mut state = self.state.lock();
        if let Some(every) = E::EVERY {
            let key = (E::NAME, event.subject());
            if state.sent.get(&key).is_some_and(|last| now.duration_since(*last) < every) {
                return;
            }
            state.sent.retain(|_, last| now.duration_since(*last) < FORGOTTEN);
            state.sent.insert(key, now);
        }
        if state.clients.is_empty() {
            return;
        }
        let text = line(E::NAME, serde_json::to_value(event).unwrap_or_default());
        state.clients.iter().for_each(|client| client.push_event(&text));
    }

    /// Wakes those that wait for the VM's state to change.
    pub(crate) fn changed(&self) {
        let wakers = std::mem::take(&mut self.state.lock().wakers);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Waits until `ready` is true; it is asked again whenever something has changed.
    pub(crate) async fn until(&self, ready: impl Fn() -> bool) {
        poll_fn(|context| {
            if ready() {
                return Poll::Ready(());
            }
            self.state.lock().wakers.push(context.waker().clone());
            // What changed before the waker was there woke nobody.
            if ready() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    pub(crate) fn add(&self, client: Arc<Outbox>) {
        self.state.lock().clients.push(client);
    }

    pub(crate) fn remove(&self, client: &Arc<Outbox>) {
        self.state.lock().clients.retain(|known| !Arc::ptr_eq(known, client));
    }

    /// Nothing more is sent to anybody; what waits is still written.
    pub(crate) fn close(&self) {
        self.state.lock().clients.iter().for_each(|client| client.close());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.state.lock().clients.is_empty()
    }
}

/// An event as a line: with the time, in microseconds since 1970, and its data if it has any.
fn line(name: &str, data: Value) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
    let mut event = json!({ "event": name, "timestamp": timestamp });
    if data.as_object().is_some_and(|data| !data.is_empty()) {
        event["data"] = data;
    }
    message::line(event)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[derive(Serialize, JsonSchema)]
    struct Plain {}

    impl Event for Plain {
        const NAME: &'static str = "PLAIN";
    }

    #[derive(Serialize, JsonSchema)]
    struct Limited {
        disk: String,
    }

    impl Event for Limited {
        const NAME: &'static str = "LIMITED";
        const EVERY: Option<Duration> = Some(Duration::from_secs(3600));

        fn subject(&self) -> String {
            self.disk.clone()
        }
    }

    fn taken(outbox: &Outbox) -> Vec<Value> {
        let bytes = outbox.take().now_or_never().flatten().unwrap_or_default();
        String::from_utf8(bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn all_clients_that_want_events_hear_of_them() {
        let hub = Hub::default();
        let clients: Vec<_> = (0..3).map(|_| Arc::new(Outbox::default())).collect();
        clients.iter().for_each(|client| hub.add(client.clone()));
        clients[1..].iter().for_each(|client| client.want_events());
        hub.send(&Plain {});
        hub.remove(&clients[2]);
        hub.send(&Plain {});
        let heard: Vec<_> = clients.iter().map(|client| taken(client).len()).collect();
        assert_eq!(heard, [0, 2, 1]);
    }

    #[test]
    fn what_a_guest_makes_many_of_is_sent_now_and_then() {
        let hub = Hub::default();
        let client = Arc::new(Outbox::default());
        client.want_events();
        hub.add(client.clone());
        for _ in 0..100 {
            hub.send(&Limited { disk: "a".into() });
            hub.send(&Limited { disk: "b".into() });
        }
        let heard = taken(&client);
        assert_eq!(heard.len(), 2);
        assert_eq!(heard[0]["event"], "LIMITED");
        assert_eq!(heard[0]["data"], json!({ "disk": "a" }));
        assert!(heard[0]["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000);
        assert!(heard[0]["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
    }
}
