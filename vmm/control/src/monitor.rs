//! One client's conversation: greeting, negotiation, commands (QMP specification, 2.2 to 2.5).

use crate::command::Table;
use crate::context::Context;
use crate::error::{ErrorClass, QmpError, Result};
use crate::framing::{Frame, Framer};
use crate::message::{self, Request};
use crate::outbox::Outbox;
use crate::version;
use serde_json::{Value, json};
use std::rc::Rc;
use std::sync::Arc;

/// What all clients share.
pub(crate) struct Service {
    pub(crate) table: Table,
    pub(crate) context: Context,
    /// Commands are carried out one at a time, whoever sends them.
    pub(crate) turn: futures_util::lock::Mutex<()>,
}

/// One client's conversation.
pub(crate) struct Monitor {
    service: Rc<Service>,
    outbox: Arc<Outbox>,
    framer: Framer,
    negotiated: bool,
}

impl Monitor {
    /// A conversation that begins with the greeting.
    pub(crate) fn new(service: Rc<Service>, outbox: Arc<Outbox>) -> Self {
        let greeting = json!({ "QMP": { "version": version::version(), "capabilities": [] } });
        outbox.push(&message::line(greeting));
        Self { service, outbox, framer: Framer::default(), negotiated: false }
    }

    /// Takes what the client sent, and answers it. `false` says that the client is lost.
    pub(crate) async fn receive(&mut self, bytes: &[u8]) -> bool {
        let mut frames = Vec::new();
        self.framer.push(bytes, |frame| frames.push(frame));
        for frame in frames {
            self.answer(frame).await;
            if !self.outbox.calm().await {
                return false;
            }
        }
        true
    }

    /// The client sends no more.
    pub(crate) async fn end(&mut self) {
        if let Some(frame) = self.framer.end() {
            self.answer(frame).await;
        }
    }

    async fn answer(&mut self, frame: Frame) {
        let (request, id) = message::read(frame);
        let result = match request {
            Ok(request) => self.carry_out(request).await,
            Err(error) => Err(error),
        };
        self.outbox.push(&message::answer(result, id));
    }

    async fn carry_out(&mut self, request: Request) -> Result<Value> {
        let not_found = |description: &str| Err(QmpError::new(ErrorClass::CommandNotFound, description));
        match (request.execute.as_str(), self.negotiated) {
            ("qmp_capabilities", true) => {
                return not_found("Capabilities negotiation is already complete, command ignored");
            }
            ("qmp_capabilities", false) => {}
            (_, false) => return not_found("Expecting capabilities negotiation with 'qmp_capabilities'"),
            (_, true) => {}
        }
        let service = self.service.clone();
        let _turn = service.turn.lock().await;
        let result = service.table.run(&service.context, &request.execute, request.arguments).await?;
        if !self.negotiated {
            self.negotiated = true;
            self.outbox.want_events();
        }
        Ok(result)
    }
}
