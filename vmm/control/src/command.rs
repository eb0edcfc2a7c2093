//! Commands: a name, the types of what it takes and answers, and what it does.

use crate::context::Context;
use crate::error::{QmpError, Result};
use crate::events::Event;
use crate::schema::{Schema, TypeId};
use futures_util::future::LocalBoxFuture;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

type Run = Box<dyn for<'a> Fn(&'a Context, Value) -> LocalBoxFuture<'a, Result<Value>> + Send + Sync>;

/// A command.
pub(crate) struct Command {
    name: &'static str,
    run: Run,
    arguments: fn(&mut Schema) -> TypeId,
    answer: fn(&mut Schema) -> TypeId,
}

impl Command {
    /// The command `name`, which `handler` carries out. `()` stands for no arguments, and for an empty answer.
    pub(crate) fn new<A, R, F>(name: &'static str, handler: F) -> Self
    where
        A: DeserializeOwned + JsonSchema + 'static,
        R: Serialize + JsonSchema,
        F: AsyncFn(&Context, A) -> Result<R> + Send + Sync + Copy + 'static,
    {
        let run: Run = Box::new(move |context, arguments| {
            Box::pin(async move {
                let arguments = read(arguments)?;
                let answer = serde_json::to_value(handler(context, arguments).await?);
                let answer = answer.map_err(|error| QmpError::generic(error.to_string()))?;
                Ok(if answer.is_null() { json!({}) } else { answer })
            })
        });
        Self { name, run, arguments: Schema::add::<A>, answer: Schema::add::<R> }
    }
}

/// Arguments that were checked, as their type. What the check does not see, such as numbers out of range, is told in
/// the words of the reader.
fn read<A: DeserializeOwned>(arguments: Value) -> Result<A> {
    let found = match &arguments {
        // `()` is no object.
        Value::Object(members) if members.is_empty() => {
            serde_json::from_value(arguments).or_else(|_| serde_json::from_value(Value::Null))
        }
        _ => serde_json::from_value(arguments),
    };
    found.map_err(|error| QmpError::generic(format!("Invalid parameter: {error}")))
}

struct Entry {
    command: Command,
    arguments: TypeId,
    answer: TypeId,
}

/// All commands and events, with their types.
pub(crate) struct Table {
    entries: HashMap<&'static str, Entry>,
    events: Vec<(&'static str, TypeId)>,
    schema: Schema,
}

impl Table {
    /// A table of these commands.
    pub(crate) fn new(commands: Vec<Command>) -> Self {
        let mut schema = Schema::default();
        let entries = commands.into_iter().map(|command| {
            let (arguments, answer) = ((command.arguments)(&mut schema), (command.answer)(&mut schema));
            (command.name, Entry { command, arguments, answer })
        });
        let entries = entries.collect();
        Self { entries, events: Vec::new(), schema }
    }

    /// Adds an event to what the table tells of.
    pub(crate) fn add_event<E: Event>(&mut self) {
        let kind = self.schema.add::<E>();
        self.events.push((E::NAME, kind));
    }

    /// The names of all commands, sorted.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.entries.keys().copied().collect();
        names.sort_unstable();
        names
    }

    /// What the table tells of itself: the names, and [`Table::describe`].
    pub(crate) fn about(&self) -> (Vec<&'static str>, Value) {
        (self.names(), self.describe())
    }

    /// Carries a command out.
    ///
    /// # Errors
    /// There is no such command, its arguments are not what it takes, or it failed.
    pub(crate) async fn run(
        &self,
        context: &Context,
        name: &str,
        arguments: Map<String, Value>,
    ) -> Result<Value> {
        let entry = self.entries.get(name).ok_or_else(|| {
            let description = format!("The command {name} has not been found");
            QmpError::new(crate::ErrorClass::CommandNotFound, description)
        })?;
        self.schema.check(entry.arguments, &arguments)?;
        (entry.command.run)(context, Value::Object(arguments)).await
    }

    /// Everything as `query-qmp-schema` answers it.
    pub(crate) fn describe(&self) -> Value {
        let mut all = self.schema.describe_all();
        let mut names = self.names();
        names.retain(|name| self.entries.contains_key(name));
        all.extend(names.iter().filter_map(|name| {
            let entry = self.entries.get(name)?;
            Some(json!({
                "name": name,
                "meta-type": "command",
                "arg-type": self.schema.name(entry.arguments),
                "ret-type": self.schema.name(entry.answer),
            }))
        }));
        all.extend(self.events.iter().map(
            |(name, kind)| json!({ "name": name, "meta-type": "event", "arg-type": self.schema.name(*kind) }),
        ));
        all.into()
    }
}
