//! Messages: what clients send, and what they are answered (QMP specification, 2.3 and 2.4).

use crate::error::{QmpError, Result};
use crate::framing::Frame;
use serde_json::{Map, Value};

/// A command that a client sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    /// The command's name.
    pub execute: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
}

/// Reads what a client sent. The second part is the `id`, which the answer carries, whatever it is.
pub(crate) fn read(frame: Frame) -> (Result<Request>, Option<Value>) {
    let text = match frame {
        Frame::Value(text) => text,
        Frame::Broken(why) => return (Err(QmpError::generic(why)), None),
    };
    let value = match serde_json::from_str(&text) {
        Ok(value) => value,
        Err(error) => return (Err(no_json(&text, &error)), None),
    };
    let Value::Object(mut object) = value else {
        return (Err(QmpError::generic("QMP input must be a JSON object")), None);
    };
    let id = object.remove("id");
    (request(object), id)
}

fn no_json(text: &str, error: &serde_json::Error) -> QmpError {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-') {
        return QmpError::generic(format!("JSON parse error, invalid keyword '{text}'"));
    }
    QmpError::generic(format!("JSON parse error, {error}"))
}

fn request(object: Map<String, Value>) -> Result<Request> {
    let (mut execute, mut arguments) = (None, Map::new());
    for (member, value) in object {
        match (member.as_str(), value) {
            ("execute", Value::String(name)) => execute = Some(name),
            ("execute", _) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
            ("arguments", Value::Object(object)) => arguments = object,
            ("arguments", _) => {
                return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
            }
            (other, _) => return Err(QmpError::generic(format!("QMP input member '{other}' is unexpected"))),
        }
    }
    let execute = execute.ok_or_else(|| QmpError::generic("QMP input lacks member 'execute'"))?;
    Ok(Request { execute, arguments })
}

/// The answer to a command, as a line.
pub(crate) fn answer(result: Result<Value>, id: Option<Value>) -> String {
    let mut object = Map::new();
    match result {
        Ok(value) => object.insert("return".into(), value),
        Err(error) => object.insert("error".into(), error.to_json()),
    };
    if let Some(id) = id {
        object.insert("id".into(), id);
    }
    line(Value::Object(object))
}

/// A value as a line of its own.
pub(crate) fn line(value: Value) -> String {
    format!("{value}\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error(text: &str) -> String {
        read(Frame::Value(text.into())).0.unwrap_err().description
    }

    #[test]
    fn a_command_has_a_name_and_perhaps_arguments_and_an_id() {
        let (request, id) =
            read(Frame::Value(r#"{"execute":"stop","arguments":{"a":1},"id":{"x":[1]}}"#.into()));
        let request = request.unwrap();
        assert_eq!(request.execute, "stop");
        assert_eq!(Value::Object(request.arguments), json!({"a": 1}));
        assert_eq!(id, Some(json!({"x": [1]})));
        assert_eq!(answer(Ok(json!({})), id), "{\"id\":{\"x\":[1]},\"return\":{}}\r\n");
    }

    #[test]
    fn what_is_none_is_told_in_the_usual_words() {
        for (text, message) in [
            ("[1]", "QMP input must be a JSON object"),
            ("1", "QMP input must be a JSON object"),
            ("nope", "JSON parse error, invalid keyword 'nope'"),
            ("{}", "QMP input lacks member 'execute'"),
            (r#"{"exec":"x"}"#, "QMP input member 'exec' is unexpected"),
            (r#"{"exec-oob":"x"}"#, "QMP input member 'exec-oob' is unexpected"),
            (r#"{"execute":1}"#, "QMP input member 'execute' must be a string"),
            (r#"{"execute":"x","arguments":1}"#, "QMP input member 'arguments' must be an object"),
        ] {
            assert_eq!(error(text), message, "{text}");
        }
        assert!(error(r#"{"execute" "x"}"#).starts_with("JSON parse error, "));
        let (result, id) = read(Frame::Value(r#"{"execute":1,"id":7}"#.into()));
        assert_eq!(
            answer(result.map(|_| json!({})), id),
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"QMP input member 'execute' must be a string\"},\"id\":7}\r\n"
        );
    }
}
