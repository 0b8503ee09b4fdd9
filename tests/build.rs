//! Tells the loader where libtorch is: the reference run in these tests uses the worker's engine.

include!("../worker/native/rpath.rs");

fn main() {
    println!("cargo:rerun-if-changed=../worker/native/rpath.rs");
    for arg in libtorch_link_args() {
        println!("cargo:rustc-link-arg={arg}");
    }
}
