//! A model repository on disk, in Triton's layout: `NAME/config.pbtxt`, `NAME/VERSION/model.pt`.
//!
//! Coordinators read it to deploy, workers to load; both come to the same digest of the same files. Nothing here ever
//! writes, and a model's name can't lead out of the repository's folder.
pub mod archive;
mod digests;

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use cresset_proto::{
    ids::{IdError, check_model_name},
    inference::{ModelConfig, model_version_policy::PolicyChoice},
    model_config::{
        NULL_PLATFORM, PACKAGE_PLATFORM, PBTXT_BYTES_MAX, PLATFORM, PbtxtError, is_null, model_filename, parse_pbtxt,
    },
};
use sha2::{Digest, Sha256};

use self::digests::Digests;

/// Models that a repository may hold; more are not listed.
const MODELS_MAX: usize = 100_000;
/// Files that a version may hold.
const FILES_MAX: usize = 10_000;
/// Versions of a model that are served at once.
const VERSIONS_MAX: usize = 64;

/// A repository's folder.
#[derive(Debug, Clone)]
pub struct Repository {
    root: PathBuf,
    digests: Option<Digests>,
}

/// One version of a model, ready to be deployed or loaded.
#[derive(Debug, Clone)]
pub struct StoredModel {
    /// The model's name: its folder's.
    pub name: String,
    /// The version: a folder's name too.
    pub version: u64,
    /// What `config.pbtxt` says, with the name filled in.
    pub config: ModelConfig,
    /// The file that holds the model.
    pub file: PathBuf,
    /// Bytes of all the version's files.
    pub size_bytes: u64,
    /// Lower-case hex SHA-256 over the version's files, as an [`archive`] has them. It pins what was deployed.
    pub digest: String,
}

/// A line of the repository's index.
#[derive(Debug, Clone)]
pub struct IndexEntry {
    /// The model's name.
    pub name: String,
    /// Its versions, ascending.
    pub versions: Vec<u64>,
    /// `platform` or `backend` of its configuration.
    pub platform: String,
    /// Bytes of the highest version's files.
    pub size_bytes: u64,
    /// Why it can't be deployed, if it can't.
    pub problem: Option<String>,
}

/// Why a model can't be read. No message contains a path outside the repository.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// A name that can't be a folder's.
    #[error(transparent)]
    Name(#[from] IdError),
    /// There is no such model.
    #[error("model '{0}' is not in the model repository")]
    NoModel(String),
    /// There is no such version of it.
    #[error("model '{name}' has no version {version} in the model repository; there are {there:?}")]
    NoVersion {
        /// The model.
        name: String,
        /// The version that was asked for.
        version: u64,
        /// The versions that are there.
        there: Vec<u64>,
    },
    /// There is no version at all.
    #[error("model '{0}' has no version folder (1, 2, …) in the model repository")]
    NoVersions(String),
    /// The version policy chooses nothing that is there.
    #[error("at least one version must be available under the version policy of model '{name}'; there are {there:?}")]
    NoneChosen {
        /// The model.
        name: String,
        /// The versions that are there.
        there: Vec<u64>,
    },
    /// The version policy chooses more than can be served.
    #[error(
        "the version policy of model '{name}' chooses {found} versions, the limit is {VERSIONS_MAX}; remove some, or choose fewer"
    )]
    TooManyChosen {
        /// The model.
        name: String,
        /// How many it chooses.
        found: usize,
    },
    /// A configuration that was given instead of `config.pbtxt` says something that can't be served.
    #[error("the configuration that was given for model '{name}': {text}")]
    Given {
        /// The model.
        name: String,
        /// The field and what is wrong with it.
        text: String,
    },
    /// `config.pbtxt` doesn't parse.
    #[error("{name}/config.pbtxt:{source}")]
    Pbtxt {
        /// The model.
        name: String,
        /// Line, column and fault.
        source: PbtxtError,
    },
    /// `config.pbtxt` says something that can't be served.
    #[error("{name}/config.pbtxt: {text}")]
    Config {
        /// The model.
        name: String,
        /// The field and what is wrong with it.
        text: String,
    },
    /// The file isn't there or can't be read.
    #[error("can't read {file} of model '{name}': {source}")]
    Io {
        /// The model.
        name: String,
        /// Relative to the model's folder.
        file: String,
        /// The system's words.
        source: io::Error,
    },
    /// The repository itself can't be read.
    #[error("can't read the model repository: {0}")]
    Root(io::Error),
}

impl RepositoryError {
    /// Whether the thing that was asked for just isn't there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NoModel(_) | Self::NoVersion { .. } | Self::NoVersions(_))
    }
}

impl Repository {
    /// The repository in this folder. Nothing is read yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), digests: None }
    }

    /// The same, which reads files again only when they changed; it and its clones. For whoever trusts the file system to tell:
    /// who loads a model had better look.
    #[must_use]
    pub fn remembering_digests(self) -> Self {
        Self { digests: Some(Digests::default()), ..self }
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every model, by name, with what is wrong with it. The big files are not read.
    ///
    /// # Errors
    /// [`RepositoryError::Root`].
    pub fn index(&self) -> Result<Vec<IndexEntry>, RepositoryError> {
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(RepositoryError::Root)? {
            let entry = entry.map_err(RepositoryError::Root)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if check_model_name(&name).is_ok() && entry.path().is_dir() && entries.len() < MODELS_MAX {
                entries.push(self.entry(name));
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    fn entry(&self, name: String) -> IndexEntry {
        let versions = self.versions(&name).unwrap_or_default();
        let config = self.config(&name);
        let platform = config.as_ref().map(platform_of).unwrap_or_default();
        let found = config.and_then(|config| self.locate(&name, None, &config));
        let (size_bytes, problem) = match found {
            Ok((_, files, _)) => (files.iter().map(|(_, size)| size).sum(), None),
            Err(error) => (0, Some(error.to_string())),
        };
        IndexEntry { name, versions, platform, size_bytes, problem }
    }

    /// Reads one version (`None`: the highest) and digests its files. It reads them whole: call it where blocking is fine.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn read(&self, name: &str, version: Option<u64>) -> Result<StoredModel, RepositoryError> {
        let config = self.settled_config(name, None)?;
        self.read_as(name, version, config)
    }

    /// [`read`](Self::read), with this configuration, whatever `config.pbtxt` says.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn read_as(&self, name: &str, version: Option<u64>, config: ModelConfig) -> Result<StoredModel, RepositoryError> {
        check_model_name(name)?;
        let (version, files, file) = self.locate(name, version, &config)?;
        let folder = self.root.join(name).join(version.to_string());
        let read = || digest(&folder, &files);
        let digest = match &self.digests {
            Some(digests) => digests.get(&folder, &files, read),
            None => read(),
        };
        let digest = digest.map_err(|(file, source)| RepositoryError::Io { name: name.into(), file, source })?;
        let size_bytes = files.iter().map(|(_, size)| size).sum();
        Ok(StoredModel { name: name.to_owned(), version, config, file, size_bytes, digest })
    }

    /// Reads the versions that the model's version policy chooses, ascending; with a `given` configuration, which stands in
    /// for `config.pbtxt`, those that its policy chooses.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn read_chosen(&self, name: &str, given: Option<ModelConfig>) -> Result<Vec<StoredModel>, RepositoryError> {
        let config = self.settled_config(name, given)?;
        let there = self.versions(name)?;
        if there.is_empty() {
            return Err(RepositoryError::NoVersions(name.to_owned()));
        }
        let chosen = chosen(&config, &there);
        match chosen.len() {
            0 => Err(RepositoryError::NoneChosen { name: name.to_owned(), there }),
            found if found > VERSIONS_MAX => Err(RepositoryError::TooManyChosen { name: name.to_owned(), found }),
            _ => chosen.into_iter().map(|version| self.read_as(name, Some(version), config.clone())).collect(),
        }
    }

    /// The versions that a configuration wants of those that were given with it, and the configuration, checked.
    ///
    /// # Errors
    /// [`RepositoryError`].
    pub fn choose_given(name: &str, mut config: ModelConfig, there: &[u64]) -> Result<(Vec<u64>, ModelConfig), RepositoryError> {
        check_model_name(name)?;
        check_config(name, &config).map_err(|text| RepositoryError::Given { name: name.to_owned(), text })?;
        config.name = name.to_owned();
        match chosen(&config, there) {
            chosen if chosen.is_empty() => Err(RepositoryError::NoneChosen { name: name.to_owned(), there: there.to_vec() }),
            chosen if chosen.len() > VERSIONS_MAX => {
                Err(RepositoryError::TooManyChosen { name: name.to_owned(), found: chosen.len() })
            }
            chosen => Ok((chosen, config)),
        }
    }

    /// The configuration that counts, checked, with the model's name in it.
    fn settled_config(&self, name: &str, given: Option<ModelConfig>) -> Result<ModelConfig, RepositoryError> {
        check_model_name(name)?;
        let mut config = match given {
            Some(given) => {
                check_config(name, &given).map_err(|text| RepositoryError::Given { name: name.to_owned(), text })?;
                given
            }
            None => self.config(name)?,
        };
        if !self.root.join(name).is_dir() {
            return Err(RepositoryError::NoModel(name.to_owned()));
        }
        config.name = name.to_owned();
        Ok(config)
    }

    fn config(&self, name: &str) -> Result<ModelConfig, RepositoryError> {
        let folder = self.root.join(name);
        if !folder.is_dir() {
            return Err(RepositoryError::NoModel(name.to_owned()));
        }
        let io = |source| RepositoryError::Io { name: name.to_owned(), file: "config.pbtxt".into(), source };
        let mut text = String::new();
        // One byte more than is allowed, so that a larger file is seen to be larger without being read.
        let file = File::open(folder.join("config.pbtxt")).map_err(io)?;
        file.take(PBTXT_BYTES_MAX as u64 + 1).read_to_string(&mut text).map_err(io)?;
        let config = parse_pbtxt(&text).map_err(|source| RepositoryError::Pbtxt { name: name.to_owned(), source })?;
        check_config(name, &config).map_err(|text| RepositoryError::Config { name: name.to_owned(), text })?;
        Ok(config)
    }

    fn versions(&self, name: &str) -> Result<Vec<u64>, RepositoryError> {
        let io = |source| RepositoryError::Io { name: name.to_owned(), file: ".".into(), source };
        let mut versions = Vec::new();
        for entry in std::fs::read_dir(self.root.join(name)).map_err(io)? {
            let entry = entry.map_err(io)?;
            let number = entry.file_name().to_str().and_then(|text| text.parse::<u64>().ok());
            if let Some(number) = number.filter(|number| *number > 0 && entry.path().is_dir()) {
                versions.push(number);
            }
        }
        versions.sort_unstable();
        versions.dedup();
        Ok(versions)
    }

    /// The version, its files (path inside it, size) in order, and its model file.
    #[allow(clippy::type_complexity)]
    fn locate(
        &self,
        name: &str,
        version: Option<u64>,
        config: &ModelConfig,
    ) -> Result<(u64, Vec<(String, u64)>, PathBuf), RepositoryError> {
        let there = self.versions(name)?;
        let version = match version {
            Some(version) if there.contains(&version) => version,
            Some(version) => return Err(RepositoryError::NoVersion { name: name.to_owned(), version, there }),
            None => *there.last().ok_or_else(|| RepositoryError::NoVersions(name.to_owned()))?,
        };
        let folder = self.root.join(name).join(version.to_string());
        let io = |file: String, source| RepositoryError::Io { name: name.to_owned(), file, source };
        let mut files = Vec::new();
        list(&folder, "", &mut files).map_err(|source| io(version.to_string(), source))?;
        files.sort();
        let Some(model_file) = model_filename(config) else { return Ok((version, files, folder)) };
        if !files.iter().any(|(file, _)| file == model_file) {
            return Err(io(format!("{version}/{model_file}"), io::ErrorKind::NotFound.into()));
        }
        Ok((version, files, folder.join(model_file)))
    }
}

/// The versions of those that are `there`, ascending, that a configuration's `version_policy` wants to have served.
fn chosen(config: &ModelConfig, there: &[u64]) -> Vec<u64> {
    let latest = |count: u32| {
        let count = usize::try_from(count.max(1)).unwrap_or(usize::MAX);
        there[there.len().saturating_sub(count)..].to_vec()
    };
    match config.version_policy.as_ref().and_then(|policy| policy.policy_choice.as_ref()) {
        None => latest(1),
        Some(PolicyChoice::Latest(policy)) => latest(policy.num_versions),
        Some(PolicyChoice::All(_)) => there.to_vec(),
        Some(PolicyChoice::Specific(policy)) => {
            let wanted = |version: &&u64| i64::try_from(**version).is_ok_and(|version| policy.versions.contains(&version));
            there.iter().filter(wanted).copied().collect()
        }
    }
}

fn list(folder: &Path, prefix: &str, files: &mut Vec<(String, u64)>) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list(&entry.path(), &format!("{name}/"), files)?;
        } else {
            // A link counts as the file that it leads to: repositories are often made of links into a store.
            files.push((name, std::fs::metadata(entry.path())?.len()));
        }
        if files.len() > FILES_MAX {
            return Err(io::Error::other(format!("a version may hold {FILES_MAX} files")));
        }
    }
    Ok(())
}

fn digest(folder: &Path, files: &[(String, u64)]) -> Result<String, (String, io::Error)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 17];
    for (name, size) in files {
        hash.update(archive::header(name, *size));
        let mut file = File::open(folder.join(name)).map_err(|error| (name.clone(), error))?;
        loop {
            match file.read(&mut buffer).map_err(|error| (name.clone(), error))? {
                0 => break,
                count => hash.update(&buffer[..count]),
            }
        }
    }
    Ok(archive::hex(hash))
}

fn platform_of(config: &ModelConfig) -> String {
    if is_null(config) {
        return NULL_PLATFORM.to_owned();
    }
    if config.platform.is_empty() { config.backend.clone() } else { config.platform.clone() }
}

/// What can be said about a configuration without the model.
fn check_config(name: &str, config: &ModelConfig) -> Result<(), String> {
    if !config.name.is_empty() && config.name != name {
        return Err(format!("name is '{}', it must be the folder's name or be left out", config.name));
    }
    match (config.platform.as_str(), config.backend.as_str()) {
        (PLATFORM | PACKAGE_PLATFORM | "", "pytorch" | "") | (NULL_PLATFORM | "", NULL_PLATFORM) | (NULL_PLATFORM, "") => {}
        (platform, "pytorch" | NULL_PLATFORM | "") => {
            return Err(format!(
                "platform '{platform}' is not served, use '{PLATFORM}', or '{PACKAGE_PLATFORM}', both with backend 'pytorch'"
            ));
        }
        (_, backend) => return Err(format!("backend '{backend}' is not served, use 'pytorch'")),
    }
    if config.default_model_filename.split(['/', '\\']).any(|part| part == "..") {
        return Err(format!(
            "default_model_filename is '{}', it must be inside the version's folder",
            config.default_model_filename
        ));
    }
    if config.max_batch_size < 0 {
        return Err(format!("max_batch_size is {}, it must be 0 or more", config.max_batch_size));
    }
    if config.input.is_empty() || config.output.is_empty() {
        return Err("at least one input and one output have to be declared".into());
    }
    let inputs = config.input.iter().map(|tensor| ("input", &tensor.name, tensor.data_type, &tensor.dims));
    let outputs = config.output.iter().map(|tensor| ("output", &tensor.name, tensor.data_type, &tensor.dims));
    let mut seen = std::collections::BTreeSet::new();
    for (kind, tensor, data_type, dims) in inputs.chain(outputs) {
        if tensor.is_empty() {
            return Err(format!("an {kind} has no name"));
        }
        if !seen.insert((kind, tensor)) {
            return Err(format!("{kind} '{tensor}' is declared twice"));
        }
        if data_type == 0 {
            return Err(format!("{kind} '{tensor}' has no data_type"));
        }
        if let Some(dim) = dims.iter().find(|dim| **dim < -1) {
            return Err(format!("{kind} '{tensor}' has the dimension {dim}, it must be -1 (any) or 0 or more"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
