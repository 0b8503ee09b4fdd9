//! Compiles the shim over libtorch (`native/`) and tells the linker where libtorch is.

use std::path::PathBuf;

include!("native/rpath.rs");

const SOURCES: [&str; 11] = [
    "module.cpp",
    "memory.cpp",
    "file.cpp",
    "inputs.cpp",
    "results.cpp",
    "forward.cpp",
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
            println!("cargo:error=LIBTORCH is not set: run `make fetch`, or point it at a libtorch 2.11.0");
            return;
        }
    };
    if !libtorch.join("include/torch/csrc/jit/api/module.h").is_file() {
        println!("cargo:error=LIBTORCH has no libtorch headers under `include`: run `make fetch`");
        return;
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .flag("-Wall")
        .flag("-Wextra")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-isystem")
        .flag(libtorch.join("include"))
        .flag("-isystem")
        .flag(libtorch.join("include/torch/csrc/api/include"))
        .files(SOURCES.iter().map(|file| format!("native/{file}")))
        .compile("cresset_engine");
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
}
