//! A client: connects, negotiates, sends commands, and hears of events.

use crate::endpoint::{Address, EndpointError};
use serde_json::{Map, Value, json};
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// The longest line that is taken from a server, in bytes.
const MAX_LINE: u64 = 64 << 20;

/// Why a conversation failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody can be reached.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Connection(#[from] io::Error),
    /// The other side ended the conversation.
    #[error("the VM ended the conversation")]
    Ended,
    /// What the other side says is not QMP.
    #[error("what answers is no control socket: {0}")]
    Protocol(String),
    /// The command failed.
    #[error("{class}: {description}")]
    Command {
        /// The error's class.
        class: String,
        /// What it says.
        description: String,
    },
}

/// A connection to a control socket.
pub struct Client {
    input: BufReader<Box<dyn Read>>,
    output: Box<dyn Write>,
    events: VecDeque<Value>,
    greeting: Value,
}

impl Client {
    /// Connects to `address`, and negotiates no capabilities.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(address: &Address) -> Result<Self, ClientError> {
        let socket = address.connect()?;
        let (input, output) = both_ways(address, socket)?;
        let mut client =
            Self { input: BufReader::new(input), output, events: VecDeque::new(), greeting: Value::Null };
        let greeting = client.read()?;
        if greeting.get("QMP").is_none() {
            return Err(ClientError::Protocol(format!("it greets with {greeting}")));
        }
        client.greeting = greeting;
        client.execute("qmp_capabilities", Map::new())?;
        Ok(client)
    }

    /// What the server greeted with.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    fn read(&mut self) -> Result<Value, ClientError> {
        let mut line = String::new();
        let count = (&mut self.input).take(MAX_LINE).read_line(&mut line)?;
        if count == 0 {
            return Err(ClientError::Ended);
        }
        serde_json::from_str(&line).map_err(|error| ClientError::Protocol(error.to_string()))
    }

    /// Carries a command out and returns its answer. Events that come meanwhile are kept.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn execute(&mut self, name: &str, arguments: Map<String, Value>) -> Result<Value, ClientError> {
        let mut request = json!({ "execute": name });
        if !arguments.is_empty() {
            request["arguments"] = arguments.into();
        }
        writeln!(self.output, "{request}")?;
        self.output.flush()?;
        loop {
            let mut message = self.read()?;
            if message.get("event").is_some() {
                self.events.push_back(message);
                continue;
            }
            if let Some(error) = message.get("error") {
                let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
                return Err(ClientError::Command { class: text("class"), description: text("desc") });
            }
            return Ok(message["return"].take());
        }
    }

    /// The next event; waits for it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn event(&mut self) -> Result<Value, ClientError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let message = self.read()?;
            if message.get("event").is_some() {
                return Ok(message);
            }
        }
    }
}

fn both_ways(address: &Address, socket: OwnedFd) -> io::Result<(Box<dyn Read>, Box<dyn Write>)> {
    Ok(match address {
        Address::Unix(_) => {
            let stream = UnixStream::from(socket);
            (Box::new(stream.try_clone()?), Box::new(stream))
        }
        Address::Tcp { .. } => {
            let stream = TcpStream::from(socket);
            stream.set_nodelay(true)?;
            (Box::new(stream.try_clone()?), Box::new(stream))
        }
    })
}
