// The layout of a sequence's state as bytes: the attributes that differ from the pristine module.
//
// Layout, little endian (the seal around it, with version and checksum, is made in Rust):
//   u32 storages { u8 on_device, u64 length, bytes }*
//   u32 attributes { u32 length, path, value }*
//   value = u8 tag, then what the tag says (see `Tag`)
// Tensors refer to storages, so that attributes which share memory still do after a restore: a
// module that writes to one of them expects to see it in the other.

#pragma once

#include <cstddef>
#include <cstdint>

namespace crst {

enum Tag : uint8_t {
  kNone = 0,
  kTensor = 1,  // u8 type, u32 storage, i64 offset, u8 rank, i64 sizes*, i64 strides*
  kInt = 2,     // i64
  kFloat = 3,   // f64
  kBool = 4,    // u8
  kText = 5,    // u32 length, bytes
  kList = 6,    // u32 count, values
  kTuple = 7,   // u32 count, values
  kDict = 8,    // u32 count, (key, value)*
  kUndefined = 9,
};

constexpr size_t kRankMax = 64;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

}  // namespace crst
