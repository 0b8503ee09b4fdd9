//! Compiles the shim over libtorch (`native/`) and tells the linker where libtorch is. With the feature `simulated-gpu` also the
//! library that tests have the worker take for libtorch's CUDA half.

use std::path::{Path, PathBuf};

include!("native/rpath.rs");

const SOURCES: [&str; 12] = [
    "module.cpp",
    "memory.cpp",
    "file.cpp",
    "inputs.cpp",
    "results.cpp",
    "forward.cpp",
    "staged.cpp",
    "package.cpp",
    "attributes.cpp",
    "save.cpp",
    "restore.cpp",
    "testing.cpp",
];
const HEADERS: [&str; 6] = ["engine.h", "common.h", "file.h", "values.h", "attributes.h", "state.h"];

fn main() {
    for arg in libtorch_link_args() {
        println!("cargo:rustc-link-arg={arg}");
    }
    for file in SOURCES.iter().chain(&HEADERS) {
        println!("cargo:rerun-if-changed=native/{file}");
    }
    println!("cargo:rerun-if-changed=native/rpath.rs");

    let libtorch = match std::env::var_os("LIBTORCH") {
        Some(path) => PathBuf::from(path),
        None => {
            println!("cargo::error=LIBTORCH is not set: run `make fetch`, or point it at a libtorch 2.11.0");
            return;
        }
    };
    if !libtorch.join("include/torch/csrc/jit/api/module.h").is_file() {
        println!("cargo::error=LIBTORCH has no libtorch headers under `include`: run `make fetch`");
        return;
    }
    compiler(&libtorch).files(SOURCES.iter().map(|file| format!("native/{file}"))).compile("cresset_engine");
    if std::env::var_os("CARGO_FEATURE_SIMULATED_GPU").is_some() {
        simulated_gpu(&libtorch);
    }
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
}

/// What all C++ here is compiled with.
fn compiler(libtorch: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .flag("-Wall")
        .flag("-Wextra")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-isystem")
        .flag(libtorch.join("include"))
        .flag("-isystem")
        .flag(libtorch.join("include/torch/csrc/api/include"));
    build
}

/// Makes a shared library of `native/simulated_gpu.cpp`, and tells the crate where it is.
fn simulated_gpu(libtorch: &Path) {
    println!("cargo:rerun-if-changed=native/simulated_gpu.cpp");
    let library = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("libtorch_cuda.so");
    let mut command = compiler(libtorch).get_compiler().to_command();
    command.args(["-shared", "native/simulated_gpu.cpp", "-o"]).arg(&library);
    command.arg("-L").arg(libtorch.join("lib")).args(["-ltorch_cpu", "-lc10"]);
    if !command.status().is_ok_and(|status| status.success()) {
        println!("cargo::error=native/simulated_gpu.cpp doesn't compile");
    }
    println!("cargo:rustc-env=SIMULATED_GPU={}", library.display());
}
