//! Datatypes as the shim numbers them.

use super::ffi;
use crate::engine::Datatype;

/// `c10::ScalarType` of a datatype, or the shim's own number for byte strings.
pub const fn code(datatype: Datatype) -> i32 {
    match datatype {
        Datatype::Uint8 => 0,
        Datatype::Int8 => 1,
        Datatype::Int16 => 2,
        Datatype::Int32 => 3,
        Datatype::Int64 => 4,
        Datatype::Fp16 => 5,
        Datatype::Fp32 => 6,
        Datatype::Fp64 => 7,
        Datatype::Bool => 11,
        Datatype::Bf16 => 15,
        Datatype::Uint16 => 27,
        Datatype::Uint32 => 28,
        Datatype::Uint64 => 29,
        Datatype::Bytes => ffi::TYPE_BYTES,
    }
}

/// The datatype of a number; `None` for a type that has no name on the wire.
pub fn datatype(code_of: i32) -> Option<Datatype> {
    Datatype::ALL.into_iter().find(|datatype| code(*datatype) == code_of)
}
