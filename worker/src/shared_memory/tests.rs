use cresset_proto::{
    inference::model_infer_response::InferOutputTensor,
    parameters::{int64_parameter, string_parameter},
    shared_memory::{BYTE_SIZE, OFFSET, REGION},
};
use proptest::prelude::*;

use super::*;

/// A shared memory object that goes with the test.
struct Object {
    key: String,
    file: File,
}

impl Object {
    fn new(bytes: &[u8]) -> Self {
        let key = format!("/cresset-test-{:032x}", rand::random::<u128>());
        let flags = shm::OFlags::CREATE | shm::OFlags::EXCL | shm::OFlags::RDWR;
        let file = File::from(shm::open(&key, flags, shm::Mode::RUSR | shm::Mode::WUSR).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        Self { key, file }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        shm::unlink(&self.key).unwrap();
    }
}

fn place(region: &str, offset: u64, byte_size: u64) -> Reference {
    Reference { region: region.into(), offset, byte_size }
}

fn wanted(output: &str, region: &str, offset: i64, byte_size: i64) -> InferRequestedOutputTensor {
    let parameters = [
        (REGION.into(), string_parameter(region)),
        (OFFSET.into(), int64_parameter(offset)),
        (BYTE_SIZE.into(), int64_parameter(byte_size)),
    ];
    InferRequestedOutputTensor { name: output.into(), parameters: parameters.into() }
}

fn response(outputs: &[(&str, &'static [u8])]) -> ModelInferResponse {
    ModelInferResponse {
        outputs: outputs.iter().map(|(name, _)| InferOutputTensor { name: (*name).into(), ..Default::default() }).collect(),
        raw_output_contents: outputs.iter().map(|(_, data)| Bytes::from_static(data)).collect(),
        ..Default::default()
    }
}

#[test]
fn bytes_come_from_a_region_and_go_to_one() {
    let object = Object::new(&(0..64).collect::<Vec<u8>>());
    let memory = SharedMemory::default();
    memory.register("in", &object.key, 3, 10).unwrap();
    memory.register("out", object.key.trim_start_matches('/'), 32, 32).unwrap();
    assert_eq!(memory.reader().read(&place("in", 2, 4)).unwrap()[..], [5, 6, 7, 8]);

    let placements = memory.placements(&[wanted("b", "out", 1, 8), InferRequestedOutputTensor::default()]).unwrap();
    let mut answer = response(&[("a", b"stays"), ("b", b"moves")]);
    placements.apply(&mut answer).unwrap();
    assert_eq!(answer.raw_output_contents, [Bytes::from_static(b"stays"), Bytes::new()]);
    assert_eq!(answer.outputs.len(), 2);
    assert_eq!(object.bytes()[32..40], [32, b'm', b'o', b'v', b'e', b's', 38, 39], "no byte beside them is touched");
}

#[test]
fn registering_is_checked_and_said_in_tritons_words() {
    let object = Object::new(&[0; 64]);
    let memory = SharedMemory::default();
    memory.register("r", &object.key, 0, 64).unwrap();
    let refused = |name: &str, key: &str, offset, byte_size| {
        let error = memory.register(name, key, offset, byte_size).unwrap_err();
        (error.reason(), error.to_string())
    };
    let (reason, text) = refused("r", &object.key, 0, 64);
    assert_eq!(reason, Reason::AlreadyExists);
    assert!(text.starts_with("shared memory region 'r' already in manager"), "{text}");
    let (reason, text) = refused("x", "/cresset-test-that-is-not-there", 0, 1);
    assert_eq!(reason, Reason::RegionFailed);
    assert!(text.starts_with("Unable to open shared memory region: '/cresset-test-that-is-not-there'"), "{text}");
    for key in ["", "/", "/a/b", "../etc/passwd", "/..", ".", "/a\0b", &format!("/{}", "k".repeat(256))] {
        assert_eq!(refused("x", key, 0, 1).0, Reason::InvalidArgument, "{key:?}");
    }
    for (offset, byte_size) in [(0, 0), (0, 65), (64, 1), (63, 2), (u64::MAX, 1), (1, u64::MAX)] {
        assert_eq!(refused("x", &object.key, offset, byte_size).0, Reason::InvalidArgument, "{offset} {byte_size}");
    }
    assert_eq!(refused("", &object.key, 0, 1).0, Reason::InvalidArgument);
    assert_eq!(memory.status("").unwrap().len(), 1);
}

#[test]
fn the_status_lists_what_is_registered_until_it_is_not() {
    let object = Object::new(&[0; 64]);
    let memory = SharedMemory::default();
    for name in ["a", "b", "c"] {
        memory.register(name, &object.key, 8, 16).unwrap();
    }
    let one = memory.status("b").unwrap();
    let wanted = RegionStatus { name: "b".into(), key: object.key.clone(), offset: 8, byte_size: 16 };
    assert_eq!(one, HashMap::from([("b".into(), wanted)]));
    memory.unregister("b");
    memory.unregister("b");
    assert_eq!(memory.status("b").unwrap_err().to_string(), "Unable to find system shared memory region: 'b'");
    assert_eq!(memory.status("").unwrap().len(), 2);
    memory.unregister("");
    assert!(memory.status("").unwrap().is_empty());
    assert_eq!(memory.reader().read(&place("a", 0, 1)), Err(SharedMemoryError::UnknownRegion("a".into())));
}

#[test]
fn regions_are_bounded_in_number() {
    let object = Object::new(&[0; 8]);
    let memory = SharedMemory::default();
    let opened = (0..REGIONS_MAX).map(|number| memory.register(&number.to_string(), &object.key, 0, 8));
    // A system may allow fewer open files than that.
    let opened = opened.take_while(Result::is_ok).count();
    let error = memory.register("one more", &object.key, 0, 8).unwrap_err();
    assert!(opened < REGIONS_MAX || error == RegionError::TooMany, "{opened}: {error}");
}

#[test]
fn places_outside_a_region_are_refused() {
    let object = Object::new(&[0; 64]);
    let memory = SharedMemory::default();
    memory.register("r", &object.key, 0, 32).unwrap();
    for (offset, byte_size) in [(0, 33), (32, 1), (31, 2), (u64::MAX, 1), (1, u64::MAX)] {
        let error = memory.reader().read(&place("r", offset, byte_size)).unwrap_err();
        assert!(matches!(error, SharedMemoryError::OutsideRegion { .. }), "{error}");
    }
    let outside = memory.placements(&[wanted("y", "r", 31, 2)]).unwrap_err();
    assert!(outside.to_string().starts_with("Invalid offset + byte size for shared memory region: 'r'"), "{outside}");
    assert!(matches!(memory.placements(&[wanted("y", "s", 0, 2)]), Err(SharedMemoryError::UnknownRegion(_))));
}

#[test]
fn an_output_without_room_is_an_error_and_writes_nothing() {
    let object = Object::new(&[7; 64]);
    let memory = SharedMemory::default();
    memory.register("r", &object.key, 0, 64).unwrap();
    let placements = memory.placements(&[wanted("y", "r", 0, 3)]).unwrap();
    let error = placements.apply(&mut response(&[("y", b"four")])).unwrap_err();
    let words =
        "shared memory size specified with the request for output 'y' (3 bytes) should be at least 4 bytes to hold the results";
    assert_eq!(error.to_string(), words);
    assert_eq!(object.bytes(), [7; 64]);
}

#[test]
fn an_object_that_became_smaller_is_an_error_and_stays_as_it_is() {
    let object = Object::new(&[7; 64]);
    let memory = SharedMemory::default();
    memory.register("r", &object.key, 0, 64).unwrap();
    let placements = memory.placements(&[wanted("y", "r", 32, 4)]).unwrap();
    object.file.set_len(16).unwrap();
    let error = memory.reader().read(&place("r", 8, 16)).unwrap_err();
    assert_eq!(error.reason(), Reason::RegionFailed);
    assert!(placements.apply(&mut response(&[("y", b"four")])).is_err());
    assert_eq!(object.bytes(), [7; 16]);
    assert!(memory.reader().read(&place("r", 0, 16)).is_ok());
}

#[test]
fn a_request_may_not_bring_more_than_a_message() {
    let object = Object::new(&[0; 8]);
    // Nothing is written there, so it takes no memory.
    object.file.set_len(1 << 40).unwrap();
    let memory = SharedMemory::default();
    memory.register("r", &object.key, 0, 1 << 40).unwrap();
    let reader = memory.reader();
    assert!(reader.read(&place("r", 0, 1 << 20)).is_ok());
    let error = reader.read(&place("r", 0, REQUEST_BYTES_MAX)).unwrap_err();
    assert!(matches!(error, SharedMemoryError::TooLarge { .. }), "{error}");
    assert!(matches!(memory.reader().read(&place("r", 0, 1 << 39)), Err(SharedMemoryError::TooLarge { .. })));
}

proptest! {
    #[test]
    fn only_bytes_of_the_region_are_read(region in (0u64..80, 0u64..80), at in (0u64..80, 0u64..80)) {
        let object = Object::new(&(0..64).collect::<Vec<u8>>());
        let memory = SharedMemory::default();
        let registered = memory.register("r", &object.key, region.0, region.1);
        prop_assert_eq!(registered.is_ok(), region.1 > 0 && region.0 + region.1 <= 64);
        match memory.reader().read(&place("r", at.0, at.1)) {
            Ok(bytes) => {
                prop_assert!(registered.is_ok() && at.0 + at.1 <= region.1);
                let from = (region.0 + at.0) as usize;
                prop_assert_eq!(&bytes[..], &object.bytes()[from..from + at.1 as usize]);
            }
            Err(_) => prop_assert!(registered.is_err() || at.0 + at.1 > region.1),
        }
    }
}
