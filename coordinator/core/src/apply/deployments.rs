//! What is deployed: versions, generations and labels of models.
//!
//! Nothing here may cost a request. A version that is deployed with other content keeps its replicas where they are, and each
//! goes on answering as what it was until it has come to the new generation. A version that has to make room for others goes
//! only when those have come up ([`settle`]).
use std::collections::{BTreeMap, BTreeSet};

use cresset_proto::ids::{check_label, check_model_name};

use super::{advance, assigned, check, check_text, cut, next_generation, too_many};
use crate::{
    Outcome, Reject,
    command::{
        CONFIG_BYTES_MAX, DeploySet, DeploySpec, LABELS_MAX, REPLICAS_MAX, SHARDS_MAX, TEXT_BYTES_MAX, VERSIONS_MAX, VersionSpec,
    },
    level,
    placement::Shard,
    state::{ClusterState, Deployment, Former, Generation, ModelKey, ReplicaId, ReplicaState},
};

/// One version instead of all others.
pub(super) fn deploy_one(state: &mut ClusterState, spec: &DeploySpec) -> Result<Outcome, Reject> {
    let generation = match deploy(state, &DeploySet::from(spec))? {
        Outcome::DeployedSet { versions, .. } => versions.first().map_or(0, |(_, generation)| *generation),
        Outcome::Done { .. } | Outcome::Deployed { .. } | Outcome::Rejected(_) => 0,
    };
    Ok(Outcome::Deployed { version: spec.version, generation, epoch: state.epoch })
}

pub(super) fn deploy(state: &mut ClusterState, set: &DeploySet) -> Result<Outcome, Reject> {
    check_set(set)?;
    let key = |version| ModelKey { name: set.name.clone(), version };
    let new = set.versions.iter().filter(|spec| !state.models.contains_key(&key(spec.version))).count();
    let models_max = level::models_max(state.level);
    if state.models.len() + new > models_max {
        return Err(too_many("models", models_max));
    }
    let versions: Vec<(u64, Generation)> =
        set.versions.iter().map(|spec| (spec.version, put(state, &key(spec.version), set, spec))).collect();
    if set.only {
        let listed: BTreeSet<u64> = versions.iter().map(|(version, _)| *version).collect();
        let labelled: BTreeSet<u64> = state.labels.get(&set.name).into_iter().flat_map(BTreeMap::values).copied().collect();
        for (key, deployment) in versions_mut(state, &set.name) {
            deployment.leaving = !listed.contains(&key.version) && !labelled.contains(&key.version);
        }
    }
    settle(state, &set.name);
    Ok(Outcome::DeployedSet { versions, epoch: state.epoch })
}

/// Makes one version what the set says, and says which generation that is.
fn put(state: &mut ClusterState, key: &ModelKey, set: &DeploySet, spec: &VersionSpec) -> Generation {
    match state.models.get(key).cloned() {
        Some(known) if same_content(&known, set, spec) => {
            retry_failed(state, key);
            if let Some(deployment) = state.models.get_mut(key) {
                deployment.replicas_wanted = spec.replicas_wanted;
                deployment.demands = spec.demands.clone();
                deployment.claim = spec.claim;
                deployment.leaving = false;
            }
            known.generation
        }
        Some(known) => reload(state, key, &known, set, spec),
        None => {
            let generation = next_generation(state);
            state.models.insert(key.clone(), deployment(set, spec, generation, None));
            advance(state);
            generation
        }
    }
}

fn same_content(deployment: &Deployment, set: &DeploySet, spec: &VersionSpec) -> bool {
    let same_files =
        deployment.digest == spec.digest && deployment.size_bytes == spec.size_bytes && deployment.stored == set.stored;
    let same_form = deployment.shards == set.shards && deployment.platform == set.platform;
    same_files && same_form && deployment.config == set.config
}

fn deployment(set: &DeploySet, spec: &VersionSpec, generation: Generation, former: Option<Former>) -> Deployment {
    Deployment {
        generation,
        config: set.config.clone(),
        digest: spec.digest.clone(),
        size_bytes: spec.size_bytes,
        replicas_wanted: spec.replicas_wanted,
        shards: set.shards,
        platform: set.platform.clone(),
        stored: set.stored,
        former,
        leaving: false,
        demands: spec.demands.clone(),
        claim: spec.claim,
    }
}

/// Gives failed replicas another try where they are. The ready ones go on answering: only the failed ones get a new
/// generation, and the deployment, whose content is the same, keeps its own.
fn retry_failed(state: &mut ClusterState, key: &ModelKey) {
    let failed = state.replicas_of(key).filter(|(_, replica)| replica.state == ReplicaState::Failed);
    let failed: Vec<(ReplicaId, Generation)> = failed.map(|(id, replica)| (id.clone(), replica.former)).collect();
    if failed.is_empty() {
        return;
    }
    let generation = next_generation(state);
    let epoch = advance(state);
    for (id, former) in failed {
        let mut replica = assigned(generation, epoch);
        replica.former = former;
        state.replicas.insert(id, replica);
    }
}

/// Puts other content into a version. Replicas stay on their workers, and answer as what they were until they have loaded it.
fn reload(state: &mut ClusterState, key: &ModelKey, known: &Deployment, set: &DeploySet, spec: &VersionSpec) -> Generation {
    let generation = next_generation(state);
    let epoch = advance(state);
    // Cut in other parts it is another model: what is loaded is of no use then.
    let keeps = known.shards == set.shards;
    let answers = state.replicas_of(key).filter_map(|(_, replica)| replica.answering()).max().filter(|_| keeps);
    let former = answers.and_then(|answers| {
        let newest = Former { generation: known.generation, config: known.config.clone(), size_bytes: known.size_bytes };
        if answers >= known.generation { Some(newest) } else { known.former.clone() }
    });
    state.models.insert(key.clone(), deployment(set, spec, generation, former));
    let ids: Vec<ReplicaId> = state.replicas_of(key).map(|(id, _)| id.clone()).collect();
    for id in ids {
        let answers = state.replicas.remove(&id).and_then(|replica| replica.answering());
        if id.shard < set.shards {
            let mut replica = assigned(generation, epoch);
            replica.former = answers.filter(|_| keeps).unwrap_or(0);
            state.replicas.insert(id, replica);
        }
    }
    generation
}

pub(super) fn undeploy(state: &mut ClusterState, name: &str) -> Result<(), Reject> {
    let keys: Vec<ModelKey> = state.versions(name).map(|(key, _)| key.clone()).collect();
    if keys.is_empty() {
        return Err(Reject::UnknownModel { name: cut(name, TEXT_BYTES_MAX) });
    }
    keys.iter().for_each(|key| remove(state, key));
    state.labels.remove(name);
    advance(state);
    Ok(())
}

pub(super) fn undeploy_version(state: &mut ClusterState, name: &str, version: u64) -> Result<(), Reject> {
    let key = ModelKey { name: name.to_owned(), version };
    if !state.models.contains_key(&key) {
        return Err(unknown(state, name, version));
    }
    if let Some(label) = state.labels_of(&key).next() {
        return Err(Reject::Labelled { name: name.to_owned(), version, label: label.to_owned() });
    }
    remove(state, &key);
    // What it was to replace has nobody to wait for any more, and so it stays.
    if state.versions(name).all(|(_, deployment)| deployment.leaving) {
        versions_mut(state, name).for_each(|(_, deployment)| deployment.leaving = false);
    }
    advance(state);
    Ok(())
}

fn remove(state: &mut ClusterState, key: &ModelKey) {
    state.models.remove(key);
    state.replicas.remove_of(key);
}

fn versions_mut<'a>(state: &'a mut ClusterState, name: &'a str) -> impl Iterator<Item = (&'a ModelKey, &'a mut Deployment)> {
    let first = ModelKey { name: name.to_owned(), version: 0 };
    state.models.range_mut(first..).take_while(move |(key, _)| key.name == name)
}

fn unknown(state: &ClusterState, name: &str, version: u64) -> Reject {
    let name = cut(name, TEXT_BYTES_MAX);
    let is_deployed = state.versions(&name).next().is_some();
    if is_deployed { Reject::UnknownVersion { name, version } } else { Reject::UnknownModel { name } }
}

pub(super) fn set_labels(state: &mut ClusterState, name: &str, wanted: &BTreeMap<String, u64>) -> Result<(), Reject> {
    check(!wanted.is_empty() && wanted.len() <= LABELS_MAX, "labels", format!("must be 1 to {LABELS_MAX}"))?;
    if state.versions(name).next().is_none() {
        return Err(Reject::UnknownModel { name: cut(name, TEXT_BYTES_MAX) });
    }
    let mut labels = state.labels.get(name).cloned().unwrap_or_default();
    for (label, version) in wanted {
        if let Err(error) = check_label(label) {
            return Err(Reject::Invalid { field: "label".into(), problem: format!("isn't usable: {error}") });
        }
        if *version == 0 {
            labels.remove(label);
            continue;
        }
        let key = ModelKey { name: name.to_owned(), version: *version };
        if state.models.get(&key).is_none_or(|deployment| deployment.leaving) {
            return Err(unknown(state, name, *version));
        }
        labels.insert(label.clone(), *version);
    }
    check(labels.len() <= LABELS_MAX, "labels", format!("of a model are at most {LABELS_MAX}; take one away first"))?;
    if state.labels.get(name).cloned().unwrap_or_default() == labels {
        return Ok(());
    }
    if labels.is_empty() {
        state.labels.remove(name);
    } else {
        state.labels.insert(name.to_owned(), labels);
    }
    advance(state);
    Ok(())
}

/// Lets go of what has been replaced by now of a model: versions that leave, once those that stay have come up; and what a
/// version was before, once no replica answers as that.
pub(super) fn settle(state: &mut ClusterState, name: &str) {
    let leaving = state.versions(name).filter(|(_, deployment)| deployment.leaving);
    let leaving: Vec<ModelKey> = leaving.map(|(key, _)| key.clone()).collect();
    let has_come = |(key, deployment): (&ModelKey, &Deployment)| deployment.leaving || has_come(state, key, deployment);
    if !leaving.is_empty() && state.versions(name).all(has_come) {
        leaving.iter().for_each(|key| remove(state, key));
        advance(state);
    }
    let is_replaced = |(key, deployment): &(&ModelKey, &Deployment)| {
        deployment.former.is_some() && !state.replicas_of(key).any(|(_, replica)| replica.former > 0)
    };
    let replaced: Vec<ModelKey> = state.versions(name).filter(is_replaced).map(|(key, _)| key.clone()).collect();
    for key in replaced {
        if let Some(deployment) = state.models.get_mut(&key) {
            deployment.former = None;
        }
    }
}

/// Whether a version answers with all that it can have for now: each shard has a replica that is ready, and none on its way.
fn has_come(state: &ClusterState, key: &ModelKey, deployment: &Deployment) -> bool {
    (0..deployment.shards).all(|shard| {
        let found = Shard::survey(state, key, shard);
        let ready = found.staying.iter().any(|(_, replica)| replica.state == ReplicaState::Ready);
        ready && found.staying.iter().all(|(_, replica)| matches!(replica.state, ReplicaState::Ready | ReplicaState::Failed))
    })
}

fn check_set(set: &DeploySet) -> Result<(), Reject> {
    if let Err(error) = check_model_name(&set.name) {
        return Err(Reject::Invalid { field: "name".into(), problem: format!("isn't usable: {error}") });
    }
    check(set.config.len() <= CONFIG_BYTES_MAX, "config", format!("must be at most {CONFIG_BYTES_MAX} bytes"))?;
    check_text("platform", &set.platform)?;
    check((1..=SHARDS_MAX).contains(&set.shards), "shards", format!("must be between 1 and {SHARDS_MAX}"))?;
    let count = set.versions.len();
    check((1..=VERSIONS_MAX).contains(&count), "versions", format!("must be between 1 and {VERSIONS_MAX}"))?;
    let distinct: BTreeSet<u64> = set.versions.iter().map(|spec| spec.version).collect();
    check(distinct.len() == count, "versions", "must not name one twice")?;
    for spec in &set.versions {
        check(spec.version > 0, "version", "must be at least 1")?;
        check_text("digest", &spec.digest)?;
        spec.demands.check()?;
        let replicas = 1..=REPLICAS_MAX;
        check(replicas.contains(&spec.replicas_wanted), "replicas", format!("must be between 1 and {REPLICAS_MAX}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
