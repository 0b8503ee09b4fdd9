//! `cresset backup`: what the coordinators agree on, in a file.
use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use cresset_client::{CallError, backup::Backup};
use cresset_proto::admin::v1::{BackupRequest, admin_service_client::AdminServiceClient};
use serde_json::json;

use crate::{
    connect::{Cluster, request},
    output::{self, Format},
};

/// Flags of `cresset backup`.
#[derive(Args)]
pub struct BackupArgs {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Write a backup of the cluster, which goes on meanwhile
    Create {
        /// The file; it is replaced once the new one is whole
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Check a backup and say what is in it
    Inspect {
        /// The file
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Have coordinators that aren't started yet begin from a backup, as a new cluster
    Restore {
        /// The file
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// The empty data folder of a coordinator that is to found the new cluster; give each of them the same backup
        #[arg(long, required = true, value_name = "DIR")]
        data_dir: Vec<PathBuf>,
    },
}

/// Runs `cresset backup`.
///
/// # Errors
/// When the cluster can't be asked, when a file can't be used, and when a backup isn't whole.
pub async fn run(cluster: &Cluster, args: &BackupArgs, format: Format) -> anyhow::Result<()> {
    match &args.action {
        Action::Create { file } => show(&create(cluster, file).await?, file, format),
        Action::Inspect { file } => show(&Backup::open(file)?, file, format),
        Action::Restore { file, data_dir } => {
            let backup = Backup::open(file)?;
            data_dir.iter().try_for_each(|folder| backup.prepare(folder))?;
            show(&backup, file, format)
        }
    }
}

/// Fetches a backup; the file is as it was unless all of it came.
async fn create(cluster: &Cluster, file: &Path) -> anyhow::Result<Backup> {
    let ask = async |channel, limit| AdminServiceClient::new(channel).backup(request(BackupRequest {}, limit)).await;
    let mut pieces = cluster.call_patiently(ask).await?;
    let mut part = file.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let fetched = async {
        let cannot = || format!("can't write {}", part.display());
        let mut out = File::create(&part).with_context(cannot)?;
        while let Some(piece) = pieces.message().await.map_err(CallError::Refused)? {
            out.write_all(&piece.data).with_context(cannot)?;
        }
        out.sync_all().with_context(cannot)?;
        let backup = Backup::open(&part)?;
        std::fs::rename(&part, file).with_context(|| format!("can't replace {}", file.display()))?;
        Ok(backup)
    };
    let fetched = fetched.await;
    if fetched.is_err() {
        // Not whole, so of no use.
        let _ = std::fs::remove_file(&part);
    }
    fetched
}

fn show(backup: &Backup, file: &Path, format: Format) -> anyhow::Result<()> {
    let manifest = &backup.manifest;
    let files_bytes: u64 = backup.files.iter().map(|(_, bytes)| bytes).sum();
    if format == Format::Json {
        let mut json = serde_json::to_value(manifest)?;
        json["sha256"] = json!(backup.sha256);
        json["state_bytes"] = json!(backup.state.len());
        json["files"] = json!(backup.files.len());
        json["files_bytes"] = json!(files_bytes);
        return Ok(output::print_json(&json)?);
    }
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let models: Vec<String> = manifest.models.iter().map(|model| format!("{}/{}", model.name, model.version)).collect();
    let rows = [
        ("file", file.display().to_string()),
        ("cluster", manifest.cluster_id.clone()),
        ("epoch", manifest.epoch.to_string()),
        ("made", output::time(manifest.created_unix_ms)),
        ("by version", manifest.made_by.clone()),
        ("coordinators", list(&manifest.voters)),
        ("workers", list(&manifest.workers)),
        ("models", list(&models)),
        ("state", format!("{} bytes", backup.state.len())),
        ("files", format!("{} of models that came with loads, {files_bytes} bytes", backup.files.len())),
        ("sha256", backup.sha256.clone()),
    ];
    let lines: Vec<String> = rows.iter().map(|(name, value)| format!("{name:<13} {value}")).collect();
    Ok(output::print(&lines.join("\n"))?)
}
