use super::*;

const CONFIG: &str = "input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 4 ] } ]\n\
                      output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 4 ] } ]\n";

fn repository() -> (tempfile::TempDir, Repository) {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::new(folder.path());
    (folder, repository)
}

fn store(repository: &Repository, name: &str, version: &str, config: &str, content: &str) {
    let folder = repository.root().join(name).join(version);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(repository.root().join(name).join("config.pbtxt"), config).unwrap();
    std::fs::write(folder.join("model.pt"), content).unwrap();
}

#[test]
fn the_highest_version_is_the_default_and_the_digest_pins_its_content() {
    let (_folder, repository) = repository();
    store(&repository, "m", "2", CONFIG, "two");
    store(&repository, "m", "10", CONFIG, "ten");
    let ten = repository.read("m", None).unwrap();
    assert_eq!((ten.version, ten.size_bytes), (10, 3));
    assert_eq!(ten.digest, repository.read("m", Some(10)).unwrap().digest);
    assert_ne!(ten.digest, repository.read("m", Some(2)).unwrap().digest);
    store(&repository, "m", "10", CONFIG, "TEN");
    assert_ne!(ten.digest, repository.read("m", None).unwrap().digest);
}

#[test]
fn what_is_not_there_is_told_apart_from_what_is_broken() {
    let (_folder, repository) = repository();
    store(&repository, "m", "1", CONFIG, "one");
    assert!(repository.read("nope", None).unwrap_err().is_not_found());
    assert!(repository.read("m", Some(9)).unwrap_err().is_not_found());
    assert!(matches!(repository.read("../m", None), Err(RepositoryError::Name(_))));
    store(&repository, "bad", "1", "max_batch_size: 1\nmax_batch_sise: 8", "x");
    let error = repository.read("bad", None).unwrap_err();
    assert!(!error.is_not_found());
    assert!(error.to_string().starts_with("bad/config.pbtxt:2:1: "), "{error}");
}

#[test]
fn the_index_lists_every_model_with_its_problem() {
    let (_folder, repository) = repository();
    store(&repository, "good", "1", CONFIG, "one");
    store(&repository, "onnx", "1", &format!("platform: \"onnxruntime_onnx\"\n{CONFIG}"), "one");
    std::fs::create_dir(repository.root().join("empty")).unwrap();
    let index = repository.index().unwrap();
    let problems: Vec<_> = index.iter().map(|entry| (entry.name.as_str(), entry.problem.is_some())).collect();
    assert_eq!(problems, [("empty", true), ("good", false), ("onnx", true)]);
    assert!(index[2].problem.as_ref().unwrap().contains("use 'pytorch_libtorch'"));
}

#[test]
fn the_version_policy_chooses_what_is_served() {
    let (_folder, repository) = repository();
    let versions = |policy: &str| {
        for version in ["1", "2", "10"] {
            store(&repository, "m", version, &format!("{CONFIG}{policy}"), version);
        }
        let read = repository.read_chosen("m", None).map_err(|error| error.to_string())?;
        Ok::<_, String>(read.into_iter().map(|stored| stored.version).collect::<Vec<_>>())
    };
    assert_eq!(versions(""), Ok(vec![10]));
    assert_eq!(versions("version_policy { latest { num_versions: 2 } }"), Ok(vec![2, 10]));
    assert_eq!(versions("version_policy { latest { num_versions: 9 } }"), Ok(vec![1, 2, 10]));
    assert_eq!(versions("version_policy { all { } }"), Ok(vec![1, 2, 10]));
    assert_eq!(versions("version_policy { specific { versions: [ 10, 1, 7 ] } }"), Ok(vec![1, 10]));
    let none = versions("version_policy { specific { versions: [ 7 ] } }").unwrap_err();
    assert!(none.starts_with("at least one version must be available under the version policy"), "{none}");
    let given = parse_pbtxt(&format!("{CONFIG}version_policy {{ specific {{ versions: [ 2 ] }} }}")).unwrap();
    let read = repository.read_chosen("m", Some(given)).unwrap();
    assert_eq!((read.len(), read[0].version, read[0].config.name.as_str()), (1, 2, "m"));
    let empty = repository.read_chosen("m", Some(ModelConfig::default())).unwrap_err();
    assert!(empty.to_string().starts_with("the configuration that was given for model 'm': at least one input"), "{empty}");
    for version in 11..=VERSIONS_MAX + 10 {
        store(&repository, "m", &version.to_string(), CONFIG, "x");
    }
    assert!(versions("version_policy { all { } }").unwrap_err().contains("the limit is 64"));
}

#[test]
fn each_engine_finds_its_own_file() {
    let (_folder, repository) = repository();
    store(&repository, "package", "1", &format!("platform: \"torch_aoti\"\n{CONFIG}"), "x");
    let missing = repository.read("package", None).unwrap_err().to_string();
    assert!(missing.contains("1/model.pt2"), "{missing}");
    std::fs::write(repository.root().join("package/1/model.pt2"), "x").unwrap();
    assert!(repository.read("package", None).unwrap().file.ends_with("package/1/model.pt2"));
    store(&repository, "null", "1", &format!("backend: \"null\"\n{CONFIG}"), "x");
    std::fs::remove_file(repository.root().join("null/1/model.pt")).unwrap();
    assert_eq!(repository.read("null", None).unwrap().size_bytes, 0);
}

#[test]
fn configurations_are_checked_by_field() {
    for (config, part) in [
        ("", "at least one input"),
        ("name: \"other\"\n", "it must be the folder's name"),
        ("max_batch_size: -1\n", "max_batch_size is -1"),
        ("backend: \"python\"\n", "backend 'python' is not served"),
        ("platform: \"torch_aoti\" backend: \"null\"\n", "platform 'torch_aoti' is not served"),
        ("default_model_filename: \"../2/model.pt\"\n", "must be inside the version's folder"),
    ] {
        let error = check_config("m", &parse_pbtxt(config).unwrap()).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}
