//! Compiles the `.proto` files in pure Rust: building Cresset needs no `protoc`.
use std::{env, fs, path::PathBuf};

const FILES: [&str; 5] = [
    "inference/model_config.proto",
    "inference/grpc_service.proto",
    "cresset/raft/v1/raft.proto",
    "cresset/fleet/v1/fleet.proto",
    "cresset/admin/v1/admin.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files(FILES)?;
    let descriptors = compiler.file_descriptor_set();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        // Tensors arrive as slices of the received message and leave as the engine's own memory: no copy.
        .bytes(".inference")
        .bytes(".cresset")
        .compile_fds(descriptors)?;
    Ok(())
}
