//! The environment, read once, when first needed. Every variable is described in docs/environment.md.
//!
//! A value that cannot be read is reported and refused: from then on everything that would have used it fails
//! with the same sentence. Nothing is guessed.

use crate::log::{self, Level};
use sire_core::engine::{Backup, Compress, Config, Retention};
use sire_core::error::{Error, Result, Status};
use std::path::PathBuf;
use std::sync::OnceLock;

/// Everything that the environment says.
#[derive(Debug)]
pub(crate) struct Settings {
    /// `SIRE_DISABLE`: hooks pass everything through, `sire_*` answer `Inactive`.
    pub disabled: bool,
    /// Whether hooks serve regions (`SIRE_HOOK_MODE`, or else `TMS_HOOK_MODE`, is neither `torch` nor `allocator`).
    pub hooks: bool,
    /// Whether they are heard at driver level, if `libsire_driver.so` is there: `SIRE_HOOK_MODE` is `driver`, or not set.
    pub driver_hooks: bool,
    /// `SIRE_DRIVER_ALLOW`: of these libraries only; empty: of all.
    pub driver_allow: Vec<String>,
    /// `SIRE_DRIVER_DENY`: not of these.
    pub driver_deny: Vec<String>,
    /// `SIRE_SLABS`: what hooked functions allocate in regions comes from the engine's cache.
    pub slabs: bool,
    /// `SIRE_REGION`: tag of the process-wide region.
    pub region: Option<String>,
    /// `SIRE_BACKUP`, if it is set.
    pub backup: Option<Backup>,
    /// `SIRE_LIBCUDA`.
    pub libcuda: Option<PathBuf>,
    /// `SIRE_EXPORTABLE`: physical memory can be handed to other processes as a file descriptor.
    pub exportable: bool,
    /// `SIRE_TRACE`: the file in which the engine records its calls.
    pub trace: Option<PathBuf>,
    /// `SIRE_CONTROL`: other processes of this user can ask, pause and resume (docs/control.md).
    pub control: bool,
    /// `SIRE_CONTROL` says that they cannot, and that nothing opens the socket in passing.
    pub control_forbidden: bool,
    /// What the engine is started with.
    pub engine: Config,
    /// The variable in which PyTorch was told to use expandable segments.
    pub expandable_segments: Option<&'static str>,
    /// The `TMS_*` variables.
    pub tms: TmsSettings,
}

/// What torch_memory_saver's variables say.
#[derive(Debug, Default)]
pub(crate) struct TmsSettings {
    pub enable: bool,
    pub cpu_backup: bool,
    pub disk_backup: bool,
    pub backend: TmsBackend,
    pub retain: bool,
}

/// torch_memory_saver's two kinds of host backup: registered with the driver, or pageable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum TmsBackend {
    #[default]
    Pinned,
    Mmap,
}

impl TmsBackend {
    pub(crate) fn parse(text: &str) -> Option<TmsBackend> {
        match text {
            "pinned" => Some(TmsBackend::Pinned),
            "mmap" => Some(TmsBackend::Mmap),
            _ => None,
        }
    }
}

/// The settings, or why they are refused.
pub(crate) fn get() -> Result<&'static Settings> {
    static SETTINGS: OnceLock<std::result::Result<Settings, String>> = OnceLock::new();
    let read = SETTINGS.get_or_init(|| {
        read(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
            .inspect_err(|message| log::error!("{message}"))
    });
    read.as_ref().map_err(|message| Error::new(Status::InvalidArgument, message.clone()))
}

type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

fn read(variables: Variables<'_>) -> std::result::Result<Settings, String> {
    parsed(variables, "SIRE_LOG", "off, error, warn, info or debug", Level::parse)?;
    let mode = hook_mode(variables, "SIRE_HOOK_MODE")?.or(hook_mode(variables, "TMS_HOOK_MODE")?);
    Ok(Settings {
        disabled: flag(variables, "SIRE_DISABLE")?,
        hooks: mode.is_none_or(|mode| mode != Mode::Pools),
        driver_hooks: mode.is_none_or(|mode| mode == Mode::Driver),
        driver_allow: list(variables, "SIRE_DRIVER_ALLOW")?,
        driver_deny: list(variables, "SIRE_DRIVER_DENY")?,
        slabs: flag(variables, "SIRE_SLABS")?,
        region: variables("SIRE_REGION"),
        backup: parsed(variables, "SIRE_BACKUP", "none, cpu, disk, file or auto", parse_backup)?,
        libcuda: variables("SIRE_LIBCUDA").map(PathBuf::from),
        exportable: flag(variables, "SIRE_EXPORTABLE")?,
        trace: variables("SIRE_TRACE").map(PathBuf::from),
        control: flag(variables, "SIRE_CONTROL")?,
        control_forbidden: variables("SIRE_CONTROL").is_some() && !flag(variables, "SIRE_CONTROL")?,
        engine: engine(variables)?,
        expandable_segments: expandable_segments(variables),
        tms: tms(variables)?,
    })
}

/// What a hook mode asks of the hooks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// They serve regions, at the level of the runtime.
    Preload,
    /// Also at driver level.
    Driver,
    /// PyTorch's pools come to us by themselves; hooks pass everything through.
    Pools,
}

fn hook_mode(variables: Variables<'_>, name: &str) -> std::result::Result<Option<Mode>, String> {
    parsed(variables, name, "preload, driver, torch or allocator", |text| match text {
        "preload" => Some(Mode::Preload),
        "driver" => Some(Mode::Driver),
        "torch" | "allocator" => Some(Mode::Pools),
        _ => None,
    })
}

/// File names, separated by commas, colons or blanks. A path would match nothing.
fn list(variables: Variables<'_>, name: &str) -> std::result::Result<Vec<String>, String> {
    let wanted = "file names of libraries, such as libnccl.so or libcublas*, separated by commas";
    let names = parsed(variables, name, wanted, |text| {
        let names: Vec<String> =
            text.split([',', ':', ' ']).filter(|name| !name.is_empty()).map(str::to_owned).collect();
        (!names.is_empty() && names.iter().all(|name| !name.contains('/'))).then_some(names)
    })?;
    Ok(names.unwrap_or_default())
}

fn engine(variables: Variables<'_>) -> std::result::Result<Config, String> {
    let size = |name: &str| parsed(variables, name, "a size such as 4096, 64k, 512MiB or 6GiB", sire_core::size::parse);
    let mut config = Config::default();
    if let Some(chunk) = size("SIRE_CHUNK")? {
        config.chunk = chunk;
    }
    if let Some(small) = size("SIRE_SMALL")? {
        config.small = small;
    }
    if let Some(margin) = size("SIRE_MARGIN")? {
        config.margin = margin;
    }
    config.host_limit = size("SIRE_HOST_LIMIT")?;
    config.host_reserve = size("SIRE_HOST_RESERVE")?.unwrap_or(0);
    config.host_policy =
        parsed(variables, "SIRE_HOST_POLICY", "retain, shrink or release", parse_policy)?.unwrap_or_default();
    config.disk_dir = variables("SIRE_DISK_DIR").or_else(|| variables("TMS_DISK_BACKUP_DIR")).map(PathBuf::from);
    config.disk_limit = size("SIRE_DISK_LIMIT")?;
    config.shared_backups = flag(variables, "SIRE_SHARED_BACKUPS")?;
    config.disk_compress =
        parsed(variables, "SIRE_DISK_COMPRESS", "1, 0 or always", parse_compress)?.unwrap_or_default();
    config.io_uring = parsed(variables, "SIRE_IO_URING", "1 or 0", parse_flag)?.unwrap_or(true);
    config.dummies = flag(variables, "SIRE_DUMMY")?;
    config.shared_dir = variables("SIRE_SHARED_DIR").map(PathBuf::from);
    Ok(config)
}

fn tms(variables: Variables<'_>) -> std::result::Result<TmsSettings, String> {
    // Sire sizes its own pieces; the number is checked so that a typing error does not pass unseen.
    parsed(variables, "TMS_DISK_BACKUP_CHUNK_MB", "a whole number of MiB above 0", |text| {
        text.parse::<u64>().ok().filter(|megabytes| *megabytes > 0)
    })?;
    let settings = TmsSettings {
        enable: flag(variables, "TMS_INIT_ENABLE")?,
        cpu_backup: flag(variables, "TMS_INIT_ENABLE_CPU_BACKUP")?,
        disk_backup: flag(variables, "TMS_INIT_ENABLE_DISK_BACKUP")?,
        backend: parsed(variables, "TMS_INIT_CPU_BACKUP_BACKEND", "pinned or mmap", TmsBackend::parse)?
            .unwrap_or_default(),
        retain: flag(variables, "TMS_RETAIN_CPU_BACKUP")?,
    };
    if settings.cpu_backup && settings.disk_backup {
        return Err("TMS_INIT_ENABLE_CPU_BACKUP and TMS_INIT_ENABLE_DISK_BACKUP are both set; choose one".to_owned());
    }
    Ok(settings)
}

/// PyTorch reads both names (before 2.10 only the first, and says nothing about the other); under either, its segments never pass through cudaMalloc.
fn expandable_segments(variables: Variables<'_>) -> Option<&'static str> {
    ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"].into_iter().find(|name| {
        variables(name).is_some_and(|value| {
            value
                .split(',')
                .filter_map(|item| item.split_once(':'))
                .any(|(key, on)| key.trim() == "expandable_segments" && on.trim().eq_ignore_ascii_case("true"))
        })
    })
}

fn parsed<T>(
    variables: Variables<'_>,
    name: &str,
    wanted: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> std::result::Result<Option<T>, String> {
    match variables(name) {
        None => Ok(None),
        Some(text) => parse(&text).map(Some).ok_or_else(|| format!("{name} is {text:?}; it must be {wanted}")),
    }
}

fn flag(variables: Variables<'_>, name: &str) -> std::result::Result<bool, String> {
    Ok(parsed(variables, name, "1 or 0", parse_flag)?.unwrap_or(false))
}

fn parse_flag(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

fn parse_compress(text: &str) -> Option<Compress> {
    if text == "always" {
        return Some(Compress::Always);
    }
    parse_flag(text).map(|pays| if pays { Compress::IfItPays } else { Compress::No })
}

fn parse_backup(text: &str) -> Option<Backup> {
    match text {
        "none" => Some(Backup::None),
        "cpu" => Some(Backup::Host),
        "disk" => Some(Backup::Disk),
        "file" => Some(Backup::File),
        "auto" => Some(Backup::Auto),
        _ => None,
    }
}

fn parse_policy(text: &str) -> Option<Retention> {
    match text {
        "retain" => Some(Retention::Retain),
        "shrink" => Some(Retention::Shrink),
        "release" => Some(Retention::Release),
        _ => None,
    }
}
