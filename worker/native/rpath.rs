/// Where a binary that uses the engine looks for libtorch, in this order: the checkout's own folder
/// seen from `target/release`, the same seen from `target/release/deps` (tests), and the folder that
/// it was built against. Included by the build scripts of all packages with such binaries, since
/// cargo doesn't pass link arguments on from a library.
fn libtorch_link_args() -> Vec<String> {
    let mut args = vec![
        "-Wl,-rpath,$ORIGIN/../../.cresset/libtorch/lib".to_string(),
        "-Wl,-rpath,$ORIGIN/../../../.cresset/libtorch/lib".to_string(),
    ];
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Some(libtorch) = std::env::var_os("LIBTORCH") {
        let lib = std::path::PathBuf::from(libtorch).join("lib");
        args.push(format!("-Wl,-rpath,{}", lib.display()));
    }
    args
}
