//! Making images.

use crate::list_options::FormatOptions;
use block_graph::{DriverKind, Errno, Error, OpenContext, OpenFlags, Options, Result, Value};

/// What to make.
#[derive(Debug, Clone, Default)]
pub struct NewImage<'a> {
    /// Its file's name.
    pub filename: &'a str,
    /// Its format.
    pub format: &'a str,
    /// Its format's options, as a list.
    pub options: Option<&'a str>,
    /// Its size, unless the options or the backing file say it.
    pub size: Option<u64>,
    /// Its backing file.
    pub backing: Option<&'a str>,
    /// The backing file's format.
    pub backing_format: Option<&'a str>,
    /// The backing file is not looked at.
    pub unsafe_backing: bool,
}

/// The driver of a new image's format, and the options that it and the protocol of its file have.
///
/// # Errors
///
/// There is no such format or protocol, or it can make nothing.
pub fn format_options<'a>(
    context: &'a OpenContext,
    format: &str,
    filename: Option<&str>,
) -> Result<(&'a dyn DriverKind, FormatOptions)> {
    let found = context.registry.find(format);
    let kind = found.ok_or_else(|| Error::invalid(format!("Unknown file format '{format}'")))?;
    let mut specs = create_options(kind, "Format")?.to_vec();
    if let Some(filename) = filename {
        let protocol = context.registry.protocol_of(filename)?;
        specs.extend_from_slice(create_options(protocol, "Protocol")?);
    }
    Ok((kind, FormatOptions::new(specs)))
}

fn create_options(kind: &dyn DriverKind, what: &str) -> Result<&'static [block_graph::OptionSpec]> {
    match kind.create_options() {
        [] => Err(Error::unsupported(format!(
            "{what} driver '{}' does not support image creation",
            kind.name()
        ))),
        options => Ok(options),
    }
}

/// Makes an image: works out its size from its backing file if need be. `announce` is told what is about to be made.
///
/// # Errors
///
/// The options make no sense, the backing file cannot be opened, or the image cannot be made.
pub async fn create(context: &OpenContext, new: &NewImage<'_>, announce: impl FnOnce(String)) -> Result<()> {
    let (kind, mut options) = format_options(context, new.format, Some(new.filename))?;
    if let Some(list) = new.options {
        options.parse(list)?;
    }
    if options.is_set("size") {
        if new.size.is_some() {
            return Err(Error::invalid("The image size must be specified only once"));
        }
    } else if let Some(size) = new.size {
        options.set("size", &size.to_string())?;
    }
    set_backing(&mut options, new.format, new.backing, new.backing_format)?;
    let backing = options.get("backing_file").map(str::to_owned);
    match backing.as_deref() {
        Some(backing) if backing == new.filename => {
            let message = "Error: Trying to create an image with the same filename as the backing file";
            return Err(Error::invalid(message));
        }
        Some("") => return Err(Error::invalid("Expected backing file name, got empty string")),
        _ => {}
    }
    if let Some(backing) = backing {
        look_at_backing(context, new, &backing, &mut options).await?;
    }
    let is_header = new.format == "luks" && options.is_on("detached-header");
    if !options.is_set("size") && !is_header {
        return Err(Error::invalid("Image creation needs a size parameter"));
    }
    announce(format!("Formatting '{}', fmt={} {}", new.filename, new.format, options.line()));
    let created = create_with(context, kind, new.filename, &options).await;
    created.map_err(|error| match error.errno() {
        Errno::TOO_LARGE => {
            let hint =
                match options.size("cluster_size").or_else(|| options.get("cluster_size")?.parse().ok()) {
                    Some(1..) => " (try using a larger cluster size)",
                    _ => "",
                };
            let message = format!("The image size is too large for file format '{}'{hint}", new.format);
            Error::new(Errno::TOO_LARGE, message)
        }
        _ => error,
    })
}

/// Makes an image with options that have been checked.
///
/// # Errors
///
/// The driver's.
pub async fn create_with(
    context: &OpenContext,
    kind: &dyn DriverKind,
    filename: &str,
    options: &FormatOptions,
) -> Result<()> {
    let mut options = options.options();
    kind.create(context, filename, &mut options).await
}

/// Sets what `-b` and `-F` say.
///
/// # Errors
///
/// The format has no backing files.
pub fn set_backing(
    options: &mut FormatOptions,
    format: &str,
    backing: Option<&str>,
    backing_format: Option<&str>,
) -> Result<()> {
    let pairs = [("backing_file", "file", backing), ("backing_fmt", "file format", backing_format)];
    for (name, what, value) in pairs {
        if let Some(value) = value {
            let set = options.set(name, value);
            set.map_err(|_| {
                Error::invalid(format!("Backing {what} not supported for file format '{format}'"))
            })?;
        }
    }
    Ok(())
}

/// Opens the backing file to see that it can be, and takes its size if there is none.
async fn look_at_backing(
    context: &OpenContext,
    new: &NewImage<'_>,
    backing: &str,
    options: &mut FormatOptions,
) -> Result<()> {
    let without_format = || Error::invalid("Backing file specified without backing format");
    let format = options.get("backing_fmt").map(str::to_owned);
    if new.unsafe_backing {
        return if format.is_some() { Ok(()) } else { Err(without_format()) };
    }
    let full = block_graph::full_filename(new.filename, backing)?;
    let mut open: Options = Options::new();
    if let Some(format) = &format {
        open.set("driver", format.as_str());
    }
    open.set("force-share", Value::Switch(true));
    let flags = OpenFlags { no_io: true, ..OpenFlags::READ };
    let opened = context.open_filename(&full, open, flags).await;
    let node = opened.map_err(|error| error.hint("Could not open backing image."))?;
    let (found, size) = (node.driver().format_name(), node.len());
    node.close().await?;
    if format.is_none() {
        return Err(without_format().hint(format!("Detected format of {found}.")));
    }
    if !options.is_set("size") {
        options.set("size", &size.to_string())?;
    }
    Ok(())
}
