//! The types of commands and events, as QAPI has them: got from the Rust types that handlers take and return, checked
//! against what clients send, and shown to clients by `query-qmp-schema`.

use crate::error::{QmpError, Result};
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// A type, by its place in the [`Schema`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct TypeId(usize);

/// What a value is on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Type {
    /// A JSON type, by the name that errors and introspection have for it.
    Builtin(&'static str),
    /// One of some words.
    Enum(Vec<String>),
    /// A list.
    Array(TypeId),
    /// An object: members, and more of them that hang on the word in one of them.
    Object(Object),
    /// Any of these.
    Alternate(Vec<TypeId>),
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Object {
    members: Vec<Member>,
    /// The member whose word says which of `variants` the object is.
    tag: Option<String>,
    variants: Vec<(String, TypeId)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    name: String,
    kind: TypeId,
    optional: bool,
}

/// All types of commands and events.
#[derive(Debug)]
pub(crate) struct Schema {
    types: Vec<(String, Type)>,
    known: HashMap<String, TypeId>,
    generator: SchemaGenerator,
}

const BUILTINS: [(&str, &str); 6] = [
    ("any", "value"),
    ("str", "string"),
    ("int", "int"),
    ("number", "number"),
    ("bool", "boolean"),
    ("null", "null"),
];
const ANY: TypeId = TypeId(0);

impl Default for Schema {
    fn default() -> Self {
        let types: Vec<(String, Type)> =
            BUILTINS.iter().map(|(name, json)| ((*name).to_owned(), Type::Builtin(json))).collect();
        let known = types.iter().enumerate().map(|(n, (name, _))| (name.clone(), TypeId(n))).collect();
        Self { types, known, generator: SchemaGenerator::default() }
    }
}

impl Schema {
    /// The type of `T`, added if need be. What is no object on the wire, such as `()`, becomes an object without
    /// members, since arguments and answers are objects unless they are lists or words.
    pub(crate) fn add<T: JsonSchema>(&mut self) -> TypeId {
        let schema = self.generator.subschema_for::<T>().to_value();
        let found = self.convert(&schema, &T::schema_name());
        if self.types[found.0].1 == Type::Builtin("null") { self.empty() } else { found }
    }

    fn empty(&mut self) -> TypeId {
        let name = "empty";
        match self.known.get(name) {
            Some(found) => *found,
            None => self.insert(name, Type::Object(Object::default())),
        }
    }

    fn insert(&mut self, name: &str, kind: Type) -> TypeId {
        let id = TypeId(self.types.len());
        self.types.push((name.to_owned(), kind));
        self.known.insert(name.to_owned(), id);
        id
    }

    fn builtin(&self, name: &str) -> TypeId {
        self.known.get(name).copied().unwrap_or(ANY)
    }

    /// The type that a JSON schema describes; `name` is what it is called if it has no name of its own.
    fn convert(&mut self, schema: &Value, name: &str) -> TypeId {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str)
            && schema.get("properties").is_none()
        {
            let target = reference.rsplit('/').next().unwrap_or_default().to_owned();
            if let Some(found) = self.known.get(&target) {
                return *found;
            }
            let definition = self.generator.definitions().get(&target).cloned().unwrap_or(Value::Bool(true));
            // A type may contain itself.
            let id = self.insert(&target, Type::Builtin("value"));
            let found = self.describe(&definition, &target);
            self.types[id.0].1 = found;
            return id;
        }
        let mut alternatives = alternatives(schema);
        alternatives.retain(|one| one.get("type").and_then(Value::as_str) != Some("null"));
        if let ([only], true) = (&alternatives[..], schema.get("properties").is_none()) {
            return self.convert(&only.clone(), name);
        }
        match json_type(schema) {
            Some("string") if schema.get("enum").is_none() => return self.builtin("str"),
            Some("integer") => return self.builtin("int"),
            Some("number") => return self.builtin("number"),
            Some("boolean") => return self.builtin("bool"),
            Some("null") => return self.builtin("null"),
            None if alternatives.is_empty() && schema.get("enum").is_none() => return ANY,
            _ => {}
        }
        let kind = self.describe(schema, name);
        // The same list or object without a name may occur several times.
        let unique = match &kind {
            Type::Array(of) => format!("[{}]", self.types[of.0].0),
            _ => name.to_owned(),
        };
        match self.known.get(&unique) {
            Some(found) if self.types[found.0].1 == kind => *found,
            _ => self.insert(&unique, kind),
        }
    }

    fn describe(&mut self, schema: &Value, name: &str) -> Type {
        if let Some(words) = words(schema) {
            return Type::Enum(words);
        }
        if let Some(items) = schema.get("items") {
            return Type::Array(self.convert(items, &format!("{name}-item")));
        }
        let alternatives = alternatives(schema);
        let is_object = schema.get("properties").is_some() || json_type(schema) == Some("object");
        if let Some(tag) = alternatives.first().and_then(tag_of) {
            return Type::Object(self.union(schema, &alternatives, &tag, name));
        }
        if is_object {
            return Type::Object(self.object(schema, name, None));
        }
        if alternatives.len() > 1 {
            let ids =
                alternatives.iter().enumerate().map(|(n, one)| self.convert(one, &format!("{name}-{n}")));
            return Type::Alternate(ids.collect());
        }
        let id = self.convert(schema, name);
        self.types[id.0].1.clone()
    }

    /// Members but for `tag`; those of a type that is flattened into it too.
    fn object(&mut self, schema: &Value, name: &str, tag: Option<&str>) -> Object {
        let mut object = Object::default();
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            let inner = self.convert(&json!({ "$ref": reference }), name);
            if let Type::Object(inner) = &self.types[inner.0].1 {
                object = inner.clone();
            }
        }
        let required: Vec<&str> = schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        for (member, kind) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            if Some(member.as_str()) == tag {
                continue;
            }
            let kind = self.convert(kind, &format!("{name}-{member}"));
            let optional = !required.contains(&member.as_str());
            object.members.push(Member { name: member.clone(), kind, optional });
        }
        object
    }

    fn union(&mut self, schema: &Value, alternatives: &[Value], tag: &str, name: &str) -> Object {
        let mut object = self.object(schema, name, Some(tag));
        let mut cases = Vec::new();
        for one in alternatives {
            let property = one.get("properties").and_then(|properties| properties.get(tag));
            let Some(case) = property.and_then(|p| p.get("const")).and_then(Value::as_str) else { continue };
            let variant_name = format!("{name}-{case}");
            let variant = self.object(one, &variant_name, Some(tag));
            let variant = self.insert(&variant_name, Type::Object(variant));
            object.variants.push((case.to_owned(), variant));
            cases.push(case.to_owned());
        }
        let kind = self.insert(&format!("{name}-{tag}"), Type::Enum(cases));
        object.members.push(Member { name: tag.to_owned(), kind, optional: false });
        object.tag = Some(tag.to_owned());
        object
    }

    /// Checks what a client sent as the arguments of a command.
    ///
    /// # Errors
    /// What is missing, unexpected or of another type, and where.
    pub(crate) fn check(&self, kind: TypeId, arguments: &Map<String, Value>) -> Result<()> {
        match &self.types[kind.0].1 {
            Type::Object(object) => self.check_object(object, arguments, "", &[]),
            _ => Ok(()),
        }
    }

    fn check_value(&self, kind: TypeId, value: &Value, path: &str) -> Result<()> {
        let wrong = |expected: &str| {
            Err(QmpError::generic(format!("Invalid parameter type for '{path}', expected: {expected}")))
        };
        match (&self.types[kind.0].1, value) {
            (Type::Builtin("value"), _)
            | (Type::Builtin("string"), Value::String(_))
            | (Type::Builtin("boolean"), Value::Bool(_))
            | (Type::Builtin("null"), Value::Null)
            | (Type::Builtin("number"), Value::Number(_)) => Ok(()),
            (Type::Builtin("int"), Value::Number(number)) if !number.is_f64() => Ok(()),
            (Type::Builtin("int"), _) => wrong("integer"),
            (Type::Builtin(expected), _) => wrong(expected),
            (Type::Enum(words), Value::String(word)) if words.contains(word) => Ok(()),
            (Type::Enum(_), Value::String(word)) => {
                Err(QmpError::generic(format!("Parameter '{path}' does not accept value '{word}'")))
            }
            (Type::Enum(_), _) => wrong("string"),
            (Type::Array(of), Value::Array(list)) => list
                .iter()
                .enumerate()
                .try_for_each(|(n, value)| self.check_value(*of, value, &format!("{path}[{n}]"))),
            (Type::Array(_), _) => wrong("array"),
            (Type::Object(object), Value::Object(members)) => self.check_object(object, members, path, &[]),
            (Type::Object(_), _) => wrong("object"),
            (Type::Alternate(kinds), value) => {
                let fits = kinds.iter().find(|kind| self.is_like(**kind, value));
                match fits {
                    Some(kind) => self.check_value(*kind, value, path),
                    None => wrong("one of several types"),
                }
            }
        }
    }

    /// Whether a value has the JSON type of a kind.
    fn is_like(&self, kind: TypeId, value: &Value) -> bool {
        match &self.types[kind.0].1 {
            Type::Builtin("value") => true,
            Type::Builtin("string") | Type::Enum(_) => value.is_string(),
            Type::Builtin("boolean") => value.is_boolean(),
            Type::Builtin("null") => value.is_null(),
            Type::Builtin(_) => value.is_number(),
            Type::Array(_) => value.is_array(),
            Type::Object(_) => value.is_object(),
            Type::Alternate(kinds) => kinds.iter().any(|kind| self.is_like(*kind, value)),
        }
    }

    /// Checks an object's members; those of `outer` are another object's, which is flattened with it.
    fn check_object(
        &self,
        object: &Object,
        members: &Map<String, Value>,
        path: &str,
        outer: &[&Object],
    ) -> Result<()> {
        let full = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        for member in &object.members {
            match members.get(&member.name) {
                Some(value) => self.check_value(member.kind, value, &full(&member.name))?,
                None if member.optional => {}
                None => {
                    return Err(QmpError::generic(format!("Parameter '{}' is missing", full(&member.name))));
                }
            }
        }
        let mut whole: Vec<&Object> = outer.to_vec();
        whole.push(object);
        let case = object.tag.as_ref().and_then(|tag| members.get(tag)).and_then(Value::as_str);
        if let Some(case) = case
            && let Some((_, variant)) = object.variants.iter().find(|(name, _)| name == case)
            && let Type::Object(variant) = &self.types[variant.0].1
        {
            return self.check_object(variant, members, path, &whole);
        }
        let known = |name: &str| whole.iter().any(|one| one.members.iter().any(|member| member.name == name));
        match members.keys().find(|name| !known(name)) {
            Some(name) => Err(QmpError::generic(format!("Parameter '{}' is unexpected", full(name)))),
            None => Ok(()),
        }
    }

    /// The name of a type in what [`Schema::describe_all`] says.
    pub(crate) fn name(&self, kind: TypeId) -> &str {
        &self.types[kind.0].0
    }

    /// All types as `SchemaInfo` (QAPI's introspect.json).
    pub(crate) fn describe_all(&self) -> Vec<Value> {
        self.types.iter().map(|(name, kind)| self.describe_one(name, kind)).collect()
    }

    fn describe_one(&self, name: &str, kind: &Type) -> Value {
        match kind {
            Type::Builtin(json) => json!({ "name": name, "meta-type": "builtin", "json-type": json }),
            Type::Enum(words) => {
                let members: Vec<_> = words.iter().map(|word| json!({ "name": word })).collect();
                json!({ "name": name, "meta-type": "enum", "members": members, "values": words })
            }
            Type::Array(of) => json!({ "name": name, "meta-type": "array", "element-type": self.name(*of) }),
            Type::Alternate(kinds) => {
                let members: Vec<_> = kinds.iter().map(|kind| json!({ "type": self.name(*kind) })).collect();
                json!({ "name": name, "meta-type": "alternate", "members": members })
            }
            Type::Object(object) => {
                let member = |member: &Member| {
                    let mut info = json!({ "name": member.name, "type": self.name(member.kind) });
                    if member.optional {
                        info["default"] = Value::Null;
                    }
                    info
                };
                let members: Vec<_> = object.members.iter().map(member).collect();
                let mut info = json!({ "name": name, "meta-type": "object", "members": members });
                if let Some(tag) = &object.tag {
                    let variants = object.variants.iter();
                    let variants: Vec<_> = variants
                        .map(|(case, kind)| json!({ "case": case, "type": self.name(*kind) }))
                        .collect();
                    info["tag"] = tag.as_str().into();
                    info["variants"] = variants.into();
                }
                info
            }
        }
    }
}

fn alternatives(schema: &Value) -> Vec<Value> {
    let list = schema.get("oneOf").or_else(|| schema.get("anyOf"));
    list.and_then(Value::as_array).cloned().unwrap_or_default()
}

/// The JSON type that a schema names, but for that it may be null.
fn json_type(schema: &Value) -> Option<&str> {
    match schema.get("type")? {
        Value::String(name) => Some(name),
        Value::Array(list) => {
            let mut names = list.iter().filter_map(Value::as_str);
            let first = names.clone().next();
            names.find(|name| *name != "null").or(first)
        }
        _ => None,
    }
}

/// The words of an enumeration, whether its members have descriptions or not.
fn words(schema: &Value) -> Option<Vec<String>> {
    let word = |value: &Value| value.as_str().map(str::to_owned);
    if let Some(list) = schema.get("enum").and_then(Value::as_array) {
        return Some(list.iter().filter_map(word).collect());
    }
    let alternatives = alternatives(schema);
    let mut words = Vec::new();
    for one in &alternatives {
        match (one.get("const"), one.get("enum").and_then(Value::as_array)) {
            (Some(only), _) => words.push(word(only)?),
            (None, Some(list)) => words.extend(list.iter().filter_map(word)),
            (None, None) => return None,
        }
    }
    (!words.is_empty()).then_some(words)
}

/// The member of a variant that is always the same word.
fn tag_of(variant: &Value) -> Option<String> {
    let properties = variant.get("properties")?.as_object()?;
    properties.iter().find(|(_, kind)| kind.get("const").is_some()).map(|(name, _)| name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    enum Color {
        /// Red.
        Red,
        /// Green.
        DarkGreen,
    }

    #[derive(Deserialize, JsonSchema)]
    #[serde(tag = "type", content = "data", rename_all = "kebab-case")]
    #[allow(dead_code, reason = "only the type is looked at")]
    enum Action {
        Abort(Nothing),
        Paint(Paint),
    }

    #[derive(Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    struct Nothing {}

    #[derive(Deserialize, JsonSchema)]
    #[serde(rename_all = "kebab-case")]
    #[allow(dead_code, reason = "only the type is looked at")]
    struct Paint {
        node_name: String,
        color: Option<Color>,
        size: Option<u64>,
        list: Option<Vec<bool>>,
        anything: Option<Value>,
    }

    #[derive(Deserialize, JsonSchema)]
    #[allow(dead_code, reason = "only the type is looked at")]
    struct Transaction {
        actions: Vec<Action>,
    }

    #[derive(Deserialize, JsonSchema)]
    #[serde(tag = "driver", rename_all = "kebab-case")]
    #[allow(dead_code, reason = "only the type is looked at")]
    enum Create {
        File { filename: String, size: u64 },
        Raw(Paint),
    }

    #[derive(Deserialize, JsonSchema)]
    #[allow(dead_code, reason = "only the type is looked at")]
    struct Export {
        id: String,
        #[serde(flatten)]
        kind: Create,
    }

    fn check<T: JsonSchema>(value: Value) -> String {
        let mut schema = Schema::default();
        let kind = schema.add::<T>();
        let Value::Object(arguments) = value else { panic!("an object") };
        schema.check(kind, &arguments).map_or_else(|error| error.description, |()| "good".to_owned())
    }

    #[test]
    fn arguments_are_checked_with_the_usual_words() {
        let paint = check::<Paint>;
        assert_eq!(
            paint(
                json!({"node-name": "x", "color": "dark-green", "size": 1, "list": [true], "anything": {}})
            ),
            "good"
        );
        assert_eq!(paint(json!({})), "Parameter 'node-name' is missing");
        assert_eq!(paint(json!({"node-name": "x", "zork": 1})), "Parameter 'zork' is unexpected");
        assert_eq!(
            paint(json!({"node-name": 1})),
            "Invalid parameter type for 'node-name', expected: string"
        );
        assert_eq!(
            paint(json!({"node-name": "x", "size": "1"})),
            "Invalid parameter type for 'size', expected: integer"
        );
        assert_eq!(
            paint(json!({"node-name": "x", "color": "blue"})),
            "Parameter 'color' does not accept value 'blue'"
        );
        assert_eq!(
            paint(json!({"node-name": "x", "list": [true, 1]})),
            "Invalid parameter type for 'list[1]', expected: boolean"
        );
        assert_eq!(check::<()>(json!({"x": 1})), "Parameter 'x' is unexpected");
    }

    #[test]
    fn unions_have_the_members_of_their_case() {
        let transaction = check::<Transaction>;
        assert_eq!(transaction(json!({"actions": [{"type": "abort", "data": {}}]})), "good");
        assert_eq!(
            transaction(json!({"actions": [{"type": "abort", "data": 3}]})),
            "Invalid parameter type for 'actions[0].data', expected: object"
        );
        assert_eq!(
            transaction(json!({"actions": [{"type": "xx", "data": {}}]})),
            "Parameter 'actions[0].type' does not accept value 'xx'"
        );
        assert_eq!(
            transaction(json!({"actions": [{"type": "paint", "data": {}}]})),
            "Parameter 'actions[0].data.node-name' is missing"
        );
        let export = check::<Export>;
        assert_eq!(export(json!({"id": "a", "driver": "file", "filename": "x", "size": 1})), "good");
        assert_eq!(export(json!({"id": "a", "driver": "raw", "node-name": "x"})), "good");
        assert_eq!(
            export(json!({"id": "a", "driver": "file", "filename": "x"})),
            "Parameter 'size' is missing"
        );
        assert_eq!(
            export(json!({"id": "a", "driver": "raw", "node-name": "x", "filename": "y"})),
            "Parameter 'filename' is unexpected"
        );
        assert_eq!(export(json!({"driver": "raw", "node-name": "x"})), "Parameter 'id' is missing");
    }

    #[test]
    fn introspection_names_only_types_that_it_describes() {
        let mut schema = Schema::default();
        schema.add::<Transaction>();
        schema.add::<Export>();
        let all = schema.describe_all();
        let names: Vec<&str> = all.iter().filter_map(|info| info["name"].as_str()).collect();
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len(), "{names:?}");
        let mut named = Vec::new();
        for info in &all {
            named.extend(info["element-type"].as_str());
            for list in [&info["members"], &info["variants"]] {
                named.extend(
                    list.as_array().into_iter().flatten().filter_map(|member| member["type"].as_str()),
                );
            }
        }
        assert!(named.iter().all(|name| names.contains(name)), "{named:?} {names:?}");
        let action = all.iter().find(|info| info["name"] == "Action").unwrap();
        assert_eq!(action["tag"], "type");
        assert_eq!(action["variants"][1]["case"], "paint");
        let paint = all.iter().find(|info| info["name"] == "Paint").unwrap();
        let member = |name: &str| {
            paint["members"].as_array().unwrap().iter().find(|member| member["name"] == name).unwrap().clone()
        };
        assert_eq!(member("size"), json!({"name": "size", "type": "int", "default": null}));
        assert_eq!(member("node-name"), json!({"name": "node-name", "type": "str"}));
        assert_eq!(member("color")["type"], "Color");
    }
}
