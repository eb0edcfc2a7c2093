//! Opening images.

use crate::create::{AMEND_ENCRYPTION, CREATE_OPTIONS, create_image};
use crate::driver::Qcow2Driver;
use crate::engine::load::read_first_cluster;
use crate::engine::state::{Backing, FirstCluster};
use crate::format::Header;
use crate::measure::measure_options;
use crate::parameters::Parameters;
use block_graph::{
    DriverKind, Edge, Error, MeasureReport, NodeRef, OpenContext, OpenFlags, OptionSpec, Options, Reference,
    Result, Role, Value, async_trait, full_filename_beside,
};
use std::sync::Arc;

/// The format's entry in a registry.
#[derive(Debug, Clone, Copy, Default)]
pub struct Qcow2Kind;

#[async_trait(?Send)]
impl DriverKind for Qcow2Kind {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u8 {
        if Header::probe(head) { 100 } else { 0 }
    }

    async fn open(
        &self,
        context: &OpenContext,
        options: &mut Options,
        flags: OpenFlags,
    ) -> Result<Box<dyn block_graph::Driver>> {
        let file = context.open_file(options, flags).await?;
        let parameters = Parameters::take(options, flags, &context.secrets)?;
        let driver = open_image(context, file, options, parameters).await?;
        Ok(Box::new(driver))
    }

    fn create_options(&self) -> &'static [OptionSpec] {
        CREATE_OPTIONS
    }

    fn amend_options(&self) -> Vec<OptionSpec> {
        let own = CREATE_OPTIONS.iter().filter(|spec| spec.amendable);
        own.chain(AMEND_ENCRYPTION).copied().collect()
    }

    async fn create(&self, context: &OpenContext, filename: &str, options: &mut Options) -> Result<()> {
        create_image(context, filename, options).await
    }

    async fn measure(&self, options: &mut Options, source: Option<&NodeRef>) -> Result<MeasureReport> {
        measure_options(options, source).await
    }
}

/// Opens the image in `file`, with the other files that it names or `options` say.
async fn open_image(
    context: &OpenContext,
    file: NodeRef,
    options: &mut Options,
    parameters: Parameters,
) -> Result<Qcow2Driver> {
    let flags = parameters.flags;
    let first = read_first_cluster(&file, &parameters).await?;
    let data_file = open_data_file(context, options, &file, &first, flags).await?;
    let backing = Arc::new(Backing::default());
    let names = Names {
        image: file.clone(),
        backing: first.backing_name.clone(),
        format: first.extensions.backing_format.clone(),
    };
    let file = Edge::new(Role::File, file);
    let driver =
        Qcow2Driver::load(file, data_file, backing.clone(), parameters, first, context.secrets.clone())
            .await?;
    if let Some(node) = open_backing(context, options, names, flags).await? {
        backing.set(Some(node));
    }
    Ok(driver)
}

/// The backing file as an image names it.
struct Names {
    /// The image's file.
    image: NodeRef,
    backing: Option<Vec<u8>>,
    format: Option<Vec<u8>>,
}

async fn open_backing(
    context: &OpenContext,
    options: &mut Options,
    names: Names,
    flags: OpenFlags,
) -> Result<Option<NodeRef>> {
    let none = match options.get("backing") {
        Some(Value::Null) => true,
        Some(Value::Text(text)) => text.is_empty(),
        _ => false,
    };
    if none {
        options.take("backing");
        return Ok(None);
    }
    if flags.no_backing {
        options.take("backing");
        options.take_child("backing");
        return Ok(None);
    }
    let failed = |error: Error| error.context("Could not open backing file");
    if options.get("backing").is_some()
        || options.has("backing.filename")
        || options.has("backing.file")
        || options.has_child("backing.file")
    {
        return context.open_child(options, "backing", flags.for_backing()).await.map_err(failed);
    }
    let mut own = options.take_child("backing");
    let Some(name) = names.backing else {
        if !own.is_empty() {
            own.set("driver", own.get("driver").map_or("raw".to_owned(), ToString::to_string));
            return context.open(own, flags.for_backing()).await.map_err(failed).map(Some);
        }
        return Ok(None);
    };
    let name = String::from_utf8_lossy(&name).into_owned();
    if let Some(format) = names.format.filter(|_| !own.has("driver")) {
        own.set("driver", String::from_utf8_lossy(&format).into_owned());
    }
    let node = open_named(context, &names.image, (Role::Backing, &name), own, flags.for_backing()).await;
    node.map_err(failed).map(Some)
}

async fn open_data_file(
    context: &OpenContext,
    options: &mut Options,
    image: &NodeRef,
    first: &FirstCluster,
    flags: OpenFlags,
) -> Result<Option<Arc<Edge>>> {
    let wanted = first.header.geometry().data_file;
    if options.has_child("data-file") {
        if !wanted {
            let message = "'data-file' can only be set for images with an external data file";
            return Err(Error::invalid(message));
        }
        if !options.has("data-file") && !options.has("data-file.driver") && options.has("data-file.filename")
        {
            let mut own = options.take_child("data-file");
            let name = own.take_text("filename").unwrap_or_default();
            let node = context.open_protocol(&name, own, flags.for_file()).await?;
            return Ok(Some(Edge::new(Role::Data, node)));
        }
        if let Some(node) = context.open_child(options, "data-file", flags.for_file()).await? {
            return Ok(Some(Edge::new(Role::Data, node)));
        }
    }
    if !wanted {
        return Ok(None);
    }
    let Some(name) = &first.extensions.data_file else {
        if flags.no_io {
            return Ok(None);
        }
        return Err(Error::invalid("'data-file' is required for this image"));
    };
    let name = String::from_utf8_lossy(name).into_owned();
    let opened = open_named(context, image, (Role::Data, &name), Options::new(), flags.for_file()).await;
    match opened {
        Ok(node) => Ok(Some(Edge::new(Role::Data, node))),
        Err(_) if flags.no_io => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a file that an image names, if the context's rule lets it.
async fn open_named(
    context: &OpenContext,
    image: &NodeRef,
    (role, name): (Role, &str),
    mut options: Options,
    flags: OpenFlags,
) -> Result<NodeRef> {
    let by = image.filename().unwrap_or_else(|| image.name().to_owned());
    let reference = Reference { by: &by, role, name };
    if let Some(json) = name.strip_prefix("json:") {
        options.merge_defaults(Options::from_json(json)?);
        context.rule.check(reference, &options)?;
        return context.open(options, flags).await;
    }
    let name = full_filename_beside(image, name)?;
    let mut checked = options.clone();
    checked.set("filename", name.clone());
    context.rule.check(reference, &checked)?;
    if role == Role::Data {
        return context.open_protocol(&name, options, flags).await;
    }
    context.open_filename(&name, options, flags).await
}
