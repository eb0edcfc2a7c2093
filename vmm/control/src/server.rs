//! The thread that clients are served on.

use crate::commands;
use crate::context::{Context, Machine, VmFacts};
use crate::ear::Ear;
use crate::endpoint::{Address, Bound, SocketFile};
use crate::events::Hub;
use crate::monitor::{Monitor, Service};
use crate::outbox::Outbox;
use crate::vm_events;
use crate::wire::Wire;
use futures_util::future::{Either, join, select};
use io_loop::Listener;
use jobs::Storage;
use machine::Ending;
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Clients that are connected to one socket at a time; others wait.
const MOST_CLIENTS: usize = 16;
/// How long the end of the VM waits for clients to take what they were told.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long it waits for a command that is being carried out.
const LAST_COMMAND: Duration = Duration::from_secs(30);
/// Between attempts to accept where the host refuses for now.
const RETRY: Duration = Duration::from_millis(200);

/// Serves the clients of a VM until it ends.
#[derive(Debug)]
pub struct Server {
    hub: Arc<Hub>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Begins to serve the clients of `endpoints`. `ear` hears of what happens to the VM, and
    /// of what is done to `disks`.
    ///
    /// # Errors
    /// The host's, if it has no thread for it.
    pub fn start(
        endpoints: Vec<Bound>,
        vm: Arc<dyn Machine>,
        facts: VmFacts,
        ear: &Ear,
        disks: Option<Arc<Storage>>,
    ) -> io::Result<Self> {
        let closing = Arc::new(AtomicBool::new(false));
        let (for_thread, ear_of_thread) = (closing.clone(), ear.clone());
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
            let table = commands::table();
            let context = Context::new(vm, facts, &ear_of_thread, table.about(), disks);
            let service = Rc::new(Service { table, context, turn: futures_util::lock::Mutex::new(()) });
            io_loop::block_on(serve(endpoints, service, for_thread));
        })?;
        Ok(Self { hub: ear.hub.clone(), closing, thread: Some(thread) })
    }

    /// The VM has ended: tells clients, and ends when they have taken it, or soon.
    pub fn finish(mut self, ending: Option<&Ending>) {
        if let Some(ending) = ending {
            vm_events::send_end(&self.hub, ending);
        }
        self.end();
    }

    fn end(&mut self) {
        self.closing.store(true, Ordering::SeqCst);
        self.hub.changed();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the control socket's thread panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

async fn serve(endpoints: Vec<Bound>, service: Rc<Service>, closing: Arc<AtomicBool>) {
    let (mut tasks, mut files) = (Vec::new(), Vec::new());
    for endpoint in endpoints {
        let Bound { listener, first, at } = endpoint;
        if let Some(Address::Unix(path)) = &at {
            files.push(SocketFile(path.clone()));
        }
        let is_stdio = listener.is_none() && first.is_none();
        let wire = if is_stdio { Some(Wire::stdio()) } else { first.map(Wire::socket) };
        match wire {
            Some(Ok(wire)) => io_loop::spawn(converse(service.clone(), wire)).detach(),
            Some(Err(error)) => tracing::error!("a client of the control socket is lost: {error}"),
            None => {}
        }
        if let Some(listener) = listener {
            tasks.push(io_loop::spawn(accept(service.clone(), listener)));
        }
    }
    let hub = &service.context.hub;
    hub.until(|| closing.load(Ordering::SeqCst)).await;
    drop((tasks, files));
    // What is being done to the VM's disks is done before they are closed.
    let turn = io_loop::timeout(LAST_COMMAND, service.turn.lock()).await;
    if turn.is_none() {
        tracing::warn!("a command of the control socket does not end; it is given up");
    }
    hub.close();
    let _ = io_loop::timeout(FAREWELL, hub.until(|| hub.is_empty())).await;
}

/// Accepts clients.
async fn accept(service: Rc<Service>, listener: OwnedFd) {
    let listener = match Listener::from_socket(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!("the control socket cannot be listened on: {error}"),
    };
    let clients = Rc::new(Cell::new(0));
    loop {
        service.context.hub.until(|| clients.get() < MOST_CLIENTS).await;
        match listener.accept().await {
            Ok(stream) => {
                clients.set(clients.get() + 1);
                let (service, clients) = (service.clone(), clients.clone());
                io_loop::spawn(async move {
                    converse(service.clone(), Wire::Socket(stream)).await;
                    clients.set(clients.get() - 1);
                    service.context.hub.changed();
                })
                .detach();
            }
            Err(error) => {
                tracing::warn!("no client of the control socket can be accepted: {error}");
                io_loop::sleep(RETRY).await;
            }
        }
    }
}

/// Serves a client until it goes.
async fn converse(service: Rc<Service>, wire: Wire) {
    let outbox = Arc::new(Outbox::default());
    service.context.hub.add(outbox.clone());
    let monitor = Monitor::new(service.clone(), outbox.clone());
    join(read(monitor, &wire, &outbox), write(&wire, &outbox)).await;
    service.context.hub.remove(&outbox);
    service.context.hub.changed();
}

/// Takes what the client sends. A command that is being carried out ends, whether or not the client is still there.
async fn read(mut monitor: Monitor, wire: &Wire, outbox: &Outbox) {
    let mut buffer = [0; 4096];
    loop {
        let count = {
            let reading = pin!(wire.read(&mut buffer));
            match select(reading, pin!(outbox.lost())).await {
                Either::Left((result, _)) => result.unwrap_or(0),
                Either::Right(_) => return,
            }
        };
        if count == 0 {
            monitor.end().await;
            return outbox.close();
        }
        if !monitor.receive(&buffer[..count]).await {
            return;
        }
    }
}

/// Writes what the client is told.
async fn write(wire: &Wire, outbox: &Outbox) {
    while let Some(bytes) = outbox.take().await {
        match select(pin!(wire.write(bytes)), pin!(outbox.lost())).await {
            Either::Left((Ok(()), _)) => {}
            Either::Left((Err(_), _)) | Either::Right(_) => break,
        }
    }
    wire.end();
    outbox.lose();
}
