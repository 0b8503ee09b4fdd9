//! Coordinators, without workers. A write moves labels of a model: the cheapest command that an operator can give and that changes
//! what is agreed on.

use std::path::Path;

use anyhow::Context;
use cresset_proto::admin::v1::{
    CoordinatorRole, DeployRequest, LabelRequest, StatusRequest, admin_service_client::AdminServiceClient,
};
use tonic::{Request, Status, transport::Channel};

use super::{
    COMMAND_BYTES,
    group::{Client, Group, Seen, WRITE_TIMEOUT},
};
use crate::harness::{
    ModelRepository, fp32_model,
    launch::{Place, Recipe},
};

/// Labels that a command moves, of the greatest length.
const LABELS: usize = 4;
const LABEL_BYTES: usize = COMMAND_BYTES / LABELS;
/// So many that the labels of 64 writers are no more than a model may have.
const MODELS: usize = 8;

#[derive(Clone)]
pub(super) struct Coordinator(AdminServiceClient<Channel>);

/// Starts three, and deploys what labels can be given to.
pub(super) async fn start(data_dir: &Path) -> anyhow::Result<Group<Coordinator>> {
    let repository = ModelRepository::new()?;
    for number in 0..MODELS {
        repository.add_bytes(&model(number), &fp32_model(8, ""), b"never loaded")?;
    }
    let ids = ["c1", "c2", "c3"].map(str::to_owned);
    let recipe = Recipe { cluster_id: "bench", data_dir, repository: repository.path(), coordinator: &[], worker: &[] };
    let launches = recipe.launches(&ids, &Place::free(ids.len())?);
    let group: Group<Coordinator> = Group::start(data_dir, launches, Some(repository)).await?;
    let leader = group.whole().await?;
    let Coordinator(mut admin) = group.client(&leader)?;
    for number in 0..MODELS {
        let command_id = rand::random::<[u8; 16]>().to_vec().into();
        let request = DeployRequest { command_id, name: model(number), version: 0, replicas: 1, ..Default::default() };
        admin.deploy(request).await.with_context(|| format!("can't deploy {}", model(number)))?;
    }
    Ok(group)
}

fn model(number: usize) -> String {
    format!("model-{}", number % MODELS)
}

fn label(writer: usize, number: usize) -> String {
    format!("{:-<LABEL_BYTES$}", format!("w{writer}-{number}"))
}

impl Client for Coordinator {
    const NAME: &'static str = "cresset";

    fn new(channel: Channel) -> Self {
        Self(AdminServiceClient::new(channel))
    }

    async fn write(&self, writer: usize, number: u64) -> Result<(), Status> {
        // There in one command and gone in the next, so that each changes something.
        let version = number % 2;
        let mut request = Request::new(LabelRequest {
            command_id: rand::random::<[u8; 16]>().to_vec().into(),
            name: model(writer),
            labels: (0..LABELS).map(|number| (label(writer, number), version)).collect(),
        });
        request.set_timeout(WRITE_TIMEOUT);
        self.0.clone().label(request).await.map(drop)
    }

    async fn look(&self) -> Result<Seen, Status> {
        let request = StatusRequest { only_self: true, ..Default::default() };
        let status = self.0.clone().status(request).await?.into_inner();
        let own = status.coordinators.first().ok_or_else(|| Status::internal("it says nothing of itself"))?;
        let (leads, follows) = (own.role() == CoordinatorRole::Leader, own.role() == CoordinatorRole::Follower);
        Ok(Seen { leads, is_led: leads || follows, applied: own.applied_index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_has_its_size_and_no_model_too_many_labels() {
        let bytes: usize = (0..LABELS).map(|number| label(63, number).len()).sum();
        assert_eq!(bytes, COMMAND_BYTES);
        assert!(cresset_proto::ids::check_label(&label(63, 0)).is_ok());
        assert!(64_usize.div_ceil(MODELS) * LABELS <= cresset_core::command::LABELS_MAX);
    }
}
