//! `cresset member` and `cresset leader`: who the coordinators are, and who leads them.
//!
//! A change carries an id chosen here, the same in every retry, so that it is made once whoever had to be asked.
use cresset_proto::{
    admin::v1::{
        AddMember, ChangeMembersRequest, Member, MemberRole, MembersRequest, MembersResponse, PromoteMember, RemoveMember,
        TransferLeadershipRequest, admin_service_client::AdminServiceClient, change_members_request::Change,
    },
    ids::PeerId,
};
use serde::Serialize;

use crate::{
    connect::{Cluster, request},
    deploy::command_id,
    output::{self, Format},
    settings::address,
};

/// Flags of `cresset member`.
#[derive(clap::Args)]
pub struct MemberArgs {
    #[command(subcommand)]
    command: MemberCommand,
}

#[derive(clap::Subcommand)]
enum MemberCommand {
    /// List the coordinators: who votes, who learns, who leads, and how far each is
    List,
    /// Add a coordinator as a learner: it gets all that is agreed on, answers clients, and has no vote
    Add {
        /// Its id, which no coordinator of this cluster ever had; `member list` says which is the next
        id: PeerId,
        /// Where the others reach its port for consensus, as HOST:PORT
        #[arg(value_parser = address)]
        peer_address: String,
    },
    /// Let a learner vote, once it has caught up
    Promote {
        /// The learner
        id: PeerId,
        /// A voter that it takes the place of, in the same step: one that is lost
        #[arg(long, value_name = "ID")]
        replacing: Option<PeerId>,
    },
    /// Remove a coordinator, whether it runs or not. Its id is never used again
    Remove {
        /// The voter or learner
        id: PeerId,
    },
}

/// Flags of `cresset leader`.
#[derive(clap::Args)]
pub struct LeaderArgs {
    #[command(subcommand)]
    command: LeaderCommand,
}

#[derive(clap::Subcommand)]
enum LeaderCommand {
    /// Hand leadership to another coordinator. No prediction notices, writes wait for a moment
    Transfer {
        /// The voter that is to lead [default: the one that is furthest]
        to: Option<PeerId>,
    },
}

/// One member, as `cresset member list -o json` prints it. Keys are only ever added.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    id: String,
    /// `voter`, `learner` or `leaving`.
    role: &'static str,
    leads: bool,
    /// Whether the leader has heard it lately.
    answers: bool,
    /// Entries of the leader's log that it isn't known to have.
    behind: u64,
    peer_address: String,
    grpc_address: String,
    http_address: String,
}

impl From<Member> for Row {
    fn from(member: Member) -> Self {
        let role = match member.role() {
            MemberRole::Voter | MemberRole::Unspecified => "voter",
            MemberRole::Learner => "learner",
            MemberRole::Leaving => "leaving",
        };
        Self {
            role,
            id: member.id,
            leads: member.leads,
            answers: member.answers,
            behind: member.behind,
            peer_address: member.peer_address,
            grpc_address: member.grpc_address,
            http_address: member.http_address,
        }
    }
}

/// Runs `cresset member`.
///
/// # Errors
/// When it is refused, when nobody answers, or when stdout can't be written.
pub async fn member(cluster: &Cluster, args: &MemberArgs, format: Format) -> anyhow::Result<()> {
    let (change, done) = match &args.command {
        MemberCommand::List => return list(cluster, format).await,
        MemberCommand::Add { id, peer_address } => {
            let add = AddMember { id: id.to_string(), peer_address: peer_address.clone() };
            (Change::Add(add), format!("{id} is a learner; `cresset member list` shows when it has caught up"))
        }
        MemberCommand::Promote { id, replacing } => {
            let replaces = replacing.map(|old| old.to_string()).unwrap_or_default();
            let done = replacing.map_or(format!("{id} votes"), |old| format!("{id} votes, {old} is removed"));
            (Change::Promote(PromoteMember { id: id.to_string(), replaces }), done)
        }
        MemberCommand::Remove { id } => (Change::Remove(RemoveMember { id: id.to_string() }), format!("{id} is removed")),
    };
    let message = ChangeMembersRequest { command_id: command_id(), change: Some(change) };
    let ask = async |channel, limit| AdminServiceClient::new(channel).change_members(request(message.clone(), limit)).await;
    let changed = cluster.call(ask).await?;
    match format {
        Format::Json => output::print_json(&serde_json::json!({ "epoch": changed.epoch }))?,
        Format::Table => output::print(&done)?,
    }
    Ok(())
}

async fn list(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let ask = async |channel, limit| AdminServiceClient::new(channel).members(request(MembersRequest {}, limit)).await;
    let MembersResponse { members, current, next_id } = cluster.call(ask).await?;
    let rows: Vec<Row> = members.into_iter().map(Row::from).collect();
    if !current {
        eprintln!("cresset: no leader confirmed this, it may be old; whether a member answers is unknown");
    }
    match format {
        Format::Json => {
            output::print_json(&serde_json::json!({ "members": rows, "current": current, "next_id": next_id }))?;
        }
        Format::Table => output::print(&table(&rows, current, &next_id))?,
    }
    Ok(())
}

fn table(rows: &[Row], current: bool, next_id: &str) -> String {
    let dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let cells = |row: &Row| {
        let role = if row.leads { format!("{}, leads", row.role) } else { row.role.to_owned() };
        let answers = match (current, row.answers) {
            (false, _) => "-",
            (true, true) => "yes",
            (true, false) => "no",
        };
        let behind = if current { row.behind.to_string() } else { "-".to_owned() };
        vec![row.id.clone(), role, answers.to_owned(), behind, dash(&row.peer_address), dash(&row.grpc_address)]
    };
    let table = output::table(&["MEMBER", "ROLE", "ANSWERS", "BEHIND", "PEER", "GRPC"], rows.iter().map(cells).collect());
    format!("{table}\nthe next to be added is {next_id}\n")
}

/// Runs `cresset leader`.
///
/// # Errors
/// As [`member`].
pub async fn leader(cluster: &Cluster, args: &LeaderArgs, format: Format) -> anyhow::Result<()> {
    let LeaderCommand::Transfer { to } = &args.command;
    let message = TransferLeadershipRequest { to: to.map(|to| to.to_string()).unwrap_or_default() };
    let ask = async |channel, limit| AdminServiceClient::new(channel).transfer_leadership(request(message.clone(), limit)).await;
    let answer = cluster.call(ask).await?;
    match format {
        Format::Json => output::print_json(&serde_json::json!({ "leader": answer.leader }))?,
        Format::Table => output::print(&format!("{} leads", answer.leader))?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_shows_who_holds_things_up() {
        let row = |id: &str, role, leads, answers, behind, grpc: &str| Row {
            id: id.to_owned(),
            role,
            leads,
            answers,
            behind,
            peer_address: "10.0.0.1:8003".to_owned(),
            grpc_address: grpc.to_owned(),
            http_address: String::new(),
        };
        let rows = [row("c1", "voter", true, true, 0, "10.0.0.1:8001"), row("c4", "learner", false, false, 71, "")];
        let text = table(&rows, true, "c5");
        assert!(text.contains("c1      voter, leads  yes      0       10.0.0.1:8003  10.0.0.1:8001\n"), "{text}");
        assert!(text.contains("c4      learner       no       71      10.0.0.1:8003  -\n"), "{text}");
        assert!(text.ends_with("the next to be added is c5\n"), "{text}");
        assert!(table(&rows, false, "c5").contains("voter, leads  -        -"), "what nobody confirmed isn't claimed");
    }
}
