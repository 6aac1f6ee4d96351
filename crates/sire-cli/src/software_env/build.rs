//! The steps that make an environment. Each looks first, does what is missing, and is recorded only when it is done.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use crate::arguments::SoftwareEnvOptions;
use crate::failure::{Failure, While as _};
use crate::files::{self, Lock};
use crate::{library, output};

use super::layout::{self, Layout};
use super::marker::Marker;
use super::python;

/// Packages of every environment beside torch's own requirements: without numpy, torch warns at import.
const ALWAYS: &[&str] = &["numpy"];

/// The name under which pip knows the files that this command writes.
const OWN_NAME: &str = "sire_software_device";

/// Builds, completes or refreshes the environment.
pub fn build(options: &SoftwareEnvOptions) -> Result<ExitCode, Failure> {
    let start = Instant::now();
    let stand_in = library::stand_in(options.stand_in.as_deref())?;
    let layout = claim(&options.dir)?;
    let _lock = Lock::take(&layout.dir.join(".sire-lock"))?;
    let mut builder = Builder {
        marker: Marker::read(&layout.dir).unwrap_or_default(),
        extra: options.extra.clone(),
        layout,
        options,
        stand_in,
    };
    let changed = builder.work()?;
    let shown = options.dir.display();
    if changed.is_empty() {
        output::progress(&format!("{shown} is up to date (torch {})", options.torch));
    } else {
        let seconds = start.elapsed().as_secs();
        output::progress(&format!("{shown} is ready after {seconds} s ({}). Use it:", changed.join(", ")));
        output::progress(&format!("    {shown}/bin/python train.py              PyTorch programs need nothing else"));
        output::progress(&format!("    sire software-env {shown} exec -- CMD    any CUDA program"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes the directory, or accepts one that this command made; never touches another.
fn claim(dir: &Path) -> Result<Layout, Failure> {
    if dir.exists() && !dir.is_dir() {
        return Err(Failure::new(format!("{} is not a directory", dir.display()))
            .advice("Name a directory that does not exist yet."));
    }
    fs::create_dir_all(dir).while_(|| format!("make the directory {}", dir.display()))?;
    let layout = Layout::existing(dir)?;
    if Marker::read(&layout.dir).is_none() {
        let mut entries = layout.dir.read_dir().while_(|| format!("list {}", dir.display()))?.flatten();
        if entries.any(|entry| entry.file_name() != ".sire-lock") {
            return Err(Failure::new(format!("{} is not empty and was not made by sire software-env", dir.display()))
                .advice("Name another directory, or empty this one."));
        }
    }
    Ok(layout)
}

struct Builder<'a> {
    layout: Layout,
    marker: Marker,
    options: &'a SoftwareEnvOptions,
    stand_in: PathBuf,
    /// Extra packages: those asked for, and those that a remade environment had.
    extra: Vec<String>,
}

impl Builder<'_> {
    /// All steps, in order; what changed, in words.
    fn work(&mut self) -> Result<Vec<&'static str>, Failure> {
        let mut changed = Vec::new();
        let before = self.marker.clone();
        let skeleton = self.skeleton_is_fine();
        if !self.packages_are_fine(skeleton) {
            self.announce();
            self.marker.complete = false;
            self.record()?;
            if !skeleton {
                self.skeleton()?;
                changed.push("virtual environment");
            }
            self.forget_half_installed()?;
            if self.torch()? {
                changed.push("torch");
            }
            self.light()?;
            self.extra()?;
            changed.push("packages");
        }
        if self.library()? {
            changed.push("stand-in library");
        }
        if self.op_layer()? {
            changed.push("op layer");
        }
        self.marker.complete = true;
        self.marker.sire = env!("CARGO_PKG_VERSION").into();
        if self.marker != before {
            self.record()?;
        }
        Ok(changed)
    }

    fn record(&self) -> Result<(), Failure> {
        self.marker.write(&self.layout.dir)
    }

    fn python(&self) -> PathBuf {
        self.layout.python()
    }

    fn announce(&self) {
        let (shown, torch) = (self.options.dir.display(), &self.options.torch);
        if self.marker.torch.as_ref() == Some(torch) {
            output::progress(&format!("completing {shown} (torch {torch} is there)"));
            return;
        }
        output::progress(&format!(
            "building {shown}: PyTorch {torch} without NVIDIA's packages, on Sire's software CUDA device"
        ));
        output::progress(
            "it downloads about 600 MB (PyTorch's wheel 540; pip's cache and PIP_FIND_LINKS are used), takes 1.5 GB of disk, 1 to 3 minutes",
        );
    }

    /// Whether the environment's Python runs, has pip, and is the one that was asked for.
    fn skeleton_is_fine(&self) -> bool {
        let Some(here) = python::version(self.python().as_os_str(), "pip") else {
            return false;
        };
        match &self.options.python {
            None => true,
            Some(asked) => {
                python::version(asked, "os").is_none_or(|asked| python::minor(&asked) == python::minor(&here))
            }
        }
    }

    /// Whether pip has nothing to do.
    fn packages_are_fine(&self, skeleton: bool) -> bool {
        let marker = &self.marker;
        let wanted = &self.options.torch;
        let empty_there = |entry: &String| {
            let name = entry.replacen("==", "-", 1);
            let (name, version) = name.rsplit_once('-').unwrap_or((&name, ""));
            let info = format!("{}-{version}.dist-info/INSTALLER", name.replace('-', "_"));
            self.layout
                .site_packages()
                .is_ok_and(|site| fs::read(site.join(info)).is_ok_and(|by| by.trim_ascii() == b"sire"))
        };
        skeleton
            && marker.complete
            && marker.torch.as_ref() == Some(wanted)
            && self.layout.site_packages().is_ok_and(|site| site.join("torch/__init__.py").is_file())
            && self.options.extra.iter().all(|extra| marker.extra.contains(extra))
            && !marker.empty.is_empty()
            && marker.empty.iter().all(empty_there)
    }

    fn skeleton(&mut self) -> Result<(), Failure> {
        output::progress("step 1/4: virtual environment");
        for part in ["bin", "lib", "lib64", "include", "share", "pyvenv.cfg", "pip.conf"] {
            let path = self.layout.dir.join(part);
            let removed =
                if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).while_(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
        let lost = std::mem::take(&mut self.marker).extra;
        self.extra.extend(lost);
        self.record()?;
        let default = "python3".into();
        python::make_environment(self.options.python.as_ref().unwrap_or(&default), &self.layout.dir)?;
        self.marker.python = python::version(self.python().as_os_str(), "pip").ok_or_else(|| {
            Failure::new("the new environment's Python does not run or has no pip")
                .advice("Name another Python: --python PROGRAM")
        })?;
        self.record()
    }

    /// Removes the records of packages whose installation was cut off: pip would take them for installed, or refuse to touch them.
    fn forget_half_installed(&self) -> Result<(), Failure> {
        let site = self.layout.site_packages()?;
        for entry in site.read_dir().while_(|| format!("list {}", site.display()))?.flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            let half =
                name.ends_with(".dist-info") && !(path.join("INSTALLER").is_file() && path.join("RECORD").is_file());
            let moved_away = name.starts_with('~');
            if half || moved_away {
                output::progress(&format!("removing {name}, left by an interrupted pip"));
                fs::remove_dir_all(&path).while_(|| format!("remove {}", path.display()))?;
            }
        }
        Ok(())
    }

    fn pip(&self, arguments: &[&str], doing: &str) -> Result<(), Failure> {
        python::pip(&self.python(), self.options.offline, arguments, doing)
    }

    fn torch(&mut self) -> Result<bool, Failure> {
        let wanted = &self.options.torch;
        if self.marker.torch.as_ref() == Some(wanted) {
            return Ok(false);
        }
        output::progress(&format!("step 2/4: torch {wanted}, without its dependencies"));
        self.unpin()?;
        self.marker.torch = None;
        self.record()?;
        let doing = format!("install torch {wanted} for Python {}", self.marker.python);
        self.pip(&["install", "--no-deps", "--force-reinstall", &format!("torch=={wanted}")], &doing)?;
        self.marker.torch = Some(wanted.clone());
        self.record()?;
        Ok(true)
    }

    /// The empty distributions, and then the requirements of torch that are not NVIDIA's.
    fn light(&mut self) -> Result<(), Failure> {
        output::progress("step 3/4: empty distributions for NVIDIA's packages and triton; torch's other dependencies");
        let mut found = python::distributions(&self.python())?;
        if !found.real.is_empty() {
            output::progress(&format!("removing real NVIDIA packages: {}", found.real.join(", ")));
            let arguments: Vec<&str> =
                ["uninstall", "--yes"].into_iter().chain(found.real.iter().map(String::as_str)).collect();
            self.pip(&arguments, "remove the real NVIDIA packages")?;
            found = python::distributions(&self.python())?;
        }
        self.pin(&found)?;
        let light = found.light.iter().map(String::as_str);
        let arguments: Vec<&str> = ["install"].into_iter().chain(light).chain(ALWAYS.iter().copied()).collect();
        self.pip(&arguments, "install torch's dependencies")?;
        self.marker.empty = found.empty;
        self.record()
    }

    fn extra(&mut self) -> Result<(), Failure> {
        let missing: Vec<String> =
            self.extra.iter().filter(|extra| !self.marker.extra.contains(*extra)).cloned().collect();
        if !missing.is_empty() {
            let shown = missing.join(", ");
            output::progress(&format!("step 4/4: {shown}"));
            let arguments: Vec<&str> = ["install"].into_iter().chain(missing.iter().map(String::as_str)).collect();
            self.pip(&arguments, &format!("install {shown}"))?;
            self.marker.extra.extend(missing);
            self.record()?;
        }
        Ok(())
    }

    /// Pins torch and the empty distributions for every later pip in this environment, so that no package's wish for
    /// another version brings real NVIDIA libraries over the stand-in.
    fn pin(&self, found: &python::Distributions) -> Result<(), Failure> {
        let mut text = String::from("# Written by sire software-env: these stay as they are in this environment.\n");
        text.push_str(&format!("torch=={}\n", found.torch));
        for entry in &found.empty {
            text.push_str(entry);
            text.push('\n');
        }
        let file = self.layout.dir.join("constraints.txt");
        files::replace(&file, text.as_bytes())?;
        // pip splits this setting at blanks; as a URL it may hold any path.
        let url = format!("[install]\nconstraint = file://{}\n", percent_encoded(&file.to_string_lossy()));
        files::replace(&self.layout.dir.join("pip.conf"), url.as_bytes()).map(|_| ())
    }

    fn unpin(&self) -> Result<(), Failure> {
        match fs::remove_file(self.layout.dir.join("pip.conf")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).while_(|| "remove the old pip.conf".into())
            }
            _ => Ok(()),
        }
    }

    /// The device's library, once, and its names. Programs that run keep the file they have open.
    fn library(&mut self) -> Result<bool, Failure> {
        for stale in self.layout.stale_libraries()? {
            fs::remove_dir_all(&stale).while_(|| format!("remove {}", stale.display()))?;
        }
        let libraries = self.layout.libraries()?;
        fs::create_dir_all(&libraries).while_(|| format!("make {}", libraries.display()))?;
        let content = fs::read(&self.stand_in).while_(|| format!("read {}", self.stand_in.display()))?;
        let file = libraries.join(layout::STAND_IN);
        let mut changed = files::replace(&file, &content)?;
        for name in self.layout.cuda()?.sonames() {
            changed |= files::link(&libraries.join(name), layout::STAND_IN)?;
        }
        self.marker.stand_in_sha256 = files::sha256(&file).while_(|| format!("read {}", file.display()))?;
        Ok(changed)
    }

    /// The Python part and its start hook, with a record of their own, so that `pip list` shows them.
    fn op_layer(&mut self) -> Result<bool, Failure> {
        let site = self.layout.site_packages()?;
        let version = env!("CARGO_PKG_VERSION");
        let info = format!("{OWN_NAME}-{version}.dist-info");
        let belongs =
            |path: &str| path.starts_with(&format!("{OWN_NAME}/")) || (path.ends_with(".pth") && !path.contains('/'));
        let installed: Vec<&(&str, &[u8])> = layout::OP_LAYER.iter().filter(|(path, _)| belongs(path)).collect();
        if installed.is_empty() {
            return Err(Failure::new("this sire was built without the software device's Python part")
                .advice("Build it in a whole checkout: crates/sire-sim-cuda/python was missing."));
        }
        self.marker.op_layer_sha256 = files::sha256_of_all(installed.iter().map(|(path, content)| (*path, *content)));
        let wanted: Vec<&str> = installed.iter().map(|(path, _)| *path).collect();
        let mut changed = remove_strangers(&site.join(OWN_NAME), &site, &wanted)?;
        for (path, content) in &installed {
            changed |= files::replace(&site.join(path), content)?;
        }
        let metadata = format!(
            "Metadata-Version: 2.1\nName: {}\nVersion: {version}\nSummary: PyTorch operations on Sire's software CUDA device\n",
            OWN_NAME.replace('_', "-")
        );
        let record: String = wanted
            .iter()
            .map(|path| format!("{path},,\n"))
            .chain(["METADATA", "INSTALLER", "RECORD"].iter().map(|file| format!("{info}/{file},,\n")))
            .collect();
        for (file, text) in [("METADATA", metadata.as_str()), ("INSTALLER", "sire\n"), ("RECORD", &record)] {
            changed |= files::replace(&site.join(&info).join(file), text.as_bytes())?;
        }
        Ok(changed)
    }
}

/// Removes modules of an older op layer, which Python would still import.
fn remove_strangers(directory: &Path, site: &Path, wanted: &[&str]) -> Result<bool, Failure> {
    let mut changed = false;
    for entry in directory.read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            changed |= entry.file_name() != "__pycache__" && remove_strangers(&path, site, wanted)?;
        } else if !path.strip_prefix(site).is_ok_and(|relative| wanted.iter().any(|kept| Path::new(kept) == relative)) {
            fs::remove_file(&path).while_(|| format!("remove {}", path.display()))?;
            changed = true;
        }
    }
    Ok(changed)
}

/// A path as the path of a file URL.
fn percent_encoded(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    path.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::percent_encoded;

    #[test]
    fn a_blank_in_the_path_does_not_split_it() {
        assert_eq!(percent_encoded("/a b/ü"), "/a%20b/%C3%BC");
    }
}
