//! Shared memory regions: tensors that clients on this host put into, or take out of, POSIX shared memory.
//!
//! A region is part of a shared memory object that a client made, under a name of the client's choice. Its bytes are copied
//! in when a request is admitted and out when its response is made, by reads and writes of the object as the file that it is,
//! and never through a mapping: so a client that writes while we read gets what it wrote into its own request and nothing
//! else, and one that makes the object smaller gets an error, where a mapping would end the process with SIGBUS.
use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::Arc,
};

use bytes::Bytes;
use cresset_proto::{
    inference::{
        ModelInferRequest, ModelInferResponse, model_infer_request::InferRequestedOutputTensor,
        system_shared_memory_status_response::RegionStatus,
    },
    reason::Reason,
    shared_memory::{Reference, SharedMemoryError, short},
    tensor::{Tensor, TensorError, take_inputs_from},
};
use parking_lot::RwLock;
use rustix::shm;

/// Regions that may be registered at a time; each holds a file open.
pub const REGIONS_MAX: usize = 256;
/// Length of a region's name, in bytes.
const NAME_BYTES_MAX: usize = 255;
/// Length of a shared memory object's key, in bytes, without the slash before it: the system's own limit.
const KEY_BYTES_MAX: usize = 255;
/// What the tensors of one request may bring from shared memory together, in bytes: as much as a message may.
const REQUEST_BYTES_MAX: u64 = i32::MAX as u64;

/// Why a region can't be registered, or isn't there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum RegionError {
    #[error("a shared memory region needs a name of 1 to {NAME_BYTES_MAX} bytes, this one has {0}")]
    Name(usize),
    #[error(
        "the key '{0}' is not that of a shared memory object: a slash and then 1 to {KEY_BYTES_MAX} bytes without another slash"
    )]
    Key(String),
    #[error("shared memory region '{name}' already in manager: unregister it first, or take another name")]
    Exists { name: String },
    #[error("there are {REGIONS_MAX} shared memory regions, which is the limit: unregister some")]
    TooMany,
    #[error("Unable to open shared memory region: '{key}': {text}")]
    Open { key: String, text: String },
    #[error(
        "Invalid shared memory region: '{key}': {byte_size} bytes from {offset} don't lie in the object, which has {object_bytes} bytes"
    )]
    Outside { key: String, offset: u64, byte_size: u64, object_bytes: u64 },
    #[error("Invalid shared memory region: '{0}': its byte size must be 1 or more")]
    Empty(String),
    #[error("Unable to find system shared memory region: '{0}'")]
    Unknown(String),
}

impl RegionError {
    /// The reason to refuse the call with.
    pub fn reason(&self) -> Reason {
        // No `_` arm: a new variant has to choose.
        match self {
            Self::Name(_) | Self::Key(_) | Self::Empty(_) | Self::Outside { .. } => Reason::InvalidArgument,
            Self::Exists { .. } => Reason::AlreadyExists,
            Self::TooMany => Reason::Conflict,
            Self::Open { .. } => Reason::RegionFailed,
            Self::Unknown(_) => Reason::UnknownRegion,
        }
    }
}

/// The regions of this worker.
#[derive(Debug, Default)]
pub struct SharedMemory {
    regions: RwLock<BTreeMap<String, Arc<Region>>>,
}

#[derive(Debug)]
struct Region {
    name: String,
    key: String,
    offset: u64,
    byte_size: u64,
    object: File,
}

impl SharedMemory {
    /// Registers `byte_size` bytes from `offset` of the object at `key` as the region `name`.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is registered then.
    pub fn register(&self, name: &str, key: &str, offset: u64, byte_size: u64) -> Result<(), RegionError> {
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) {
            return Err(RegionError::Name(name.len()));
        }
        check_key(key)?;
        if byte_size == 0 {
            return Err(RegionError::Empty(short(key)));
        }
        let mut regions = self.regions.write();
        if regions.contains_key(name) {
            return Err(RegionError::Exists { name: short(name) });
        }
        if regions.len() >= REGIONS_MAX {
            return Err(RegionError::TooMany);
        }
        let region = Region { name: name.to_owned(), key: key.to_owned(), offset, byte_size, object: open(key)? };
        let object_bytes = region.object_bytes().map_err(|error| cannot_open(key, &error))?;
        if offset.checked_add(byte_size).is_none_or(|end| end > object_bytes) {
            return Err(RegionError::Outside { key: short(key), offset, byte_size, object_bytes });
        }
        regions.insert(name.to_owned(), Arc::new(region));
        Ok(())
    }

    /// Forgets a region, or all of them if the name is empty. Requests that use it keep it until they are answered. One that
    /// isn't there is fine.
    pub fn unregister(&self, name: &str) {
        let mut regions = self.regions.write();
        if name.is_empty() {
            regions.clear();
        } else {
            regions.remove(name);
        }
    }

    /// What is registered under this name, or everything if it is empty.
    ///
    /// # Errors
    /// [`RegionError::Unknown`].
    pub fn status(&self, name: &str) -> Result<HashMap<String, RegionStatus>, RegionError> {
        let regions = self.regions.read();
        let told = |region: &Arc<Region>| (region.name.clone(), region.status());
        if name.is_empty() {
            return Ok(regions.values().map(told).collect());
        }
        let region = regions.get(name).ok_or_else(|| RegionError::Unknown(short(name)))?;
        Ok(HashMap::from([told(region)]))
    }

    /// Takes the input tensors out of a request, copied from shared memory where they lie there, and says where its outputs
    /// should go.
    ///
    /// # Errors
    /// [`TensorError`]; but for a region that failed it is the caller's fault.
    pub fn take(&self, request: &mut ModelInferRequest) -> Result<(Vec<Tensor>, Placements), TensorError> {
        let reader = self.reader();
        let tensors = take_inputs_from(request, &|reference| reader.read(reference))?;
        Ok((tensors, self.placements(&request.outputs)?))
    }

    fn reader(&self) -> Reader<'_> {
        Reader { regions: self, left: Cell::new(REQUEST_BYTES_MAX) }
    }

    fn placements(&self, outputs: &[InferRequestedOutputTensor]) -> Result<Placements, SharedMemoryError> {
        let mut places = vec![];
        for output in outputs {
            if let Some(reference) = Reference::read(&output.parameters, &output.name)? {
                let region = self.find(&reference)?;
                places.push(Placement { output: output.name.clone(), region, reference });
            }
        }
        Ok(Placements(places))
    }

    /// The region of a place that lies in it.
    fn find(&self, reference: &Reference) -> Result<Arc<Region>, SharedMemoryError> {
        let Reference { region, offset, byte_size } = reference;
        let found = self.regions.read().get(region).cloned();
        let found = found.ok_or_else(|| SharedMemoryError::UnknownRegion(short(region)))?;
        match offset.checked_add(*byte_size) {
            Some(end) if end <= found.byte_size => Ok(found),
            _ => Err(SharedMemoryError::OutsideRegion {
                region: short(region),
                offset: *offset,
                byte_size: *byte_size,
                region_bytes: found.byte_size,
            }),
        }
    }
}

/// Reads the tensors of one request, which are bounded together.
struct Reader<'a> {
    regions: &'a SharedMemory,
    left: Cell<u64>,
}

impl Reader<'_> {
    /// A copy of the bytes at a place.
    fn read(&self, reference: &Reference) -> Result<Bytes, SharedMemoryError> {
        let region = self.regions.find(reference)?;
        let too_large = || SharedMemoryError::TooLarge { region: short(&reference.region), bytes_max: REQUEST_BYTES_MAX };
        self.left.set(self.left.get().checked_sub(reference.byte_size).ok_or_else(too_large)?);
        let bytes = usize::try_from(reference.byte_size).map_err(|_| too_large())?;
        // The object is asked first: memory isn't taken for bytes that it has lost.
        let read = region.check(reference).and_then(|()| {
            let mut copy = vec![0; bytes];
            region.object.read_exact_at(&mut copy, region.offset + reference.offset)?;
            Ok(copy)
        });
        read.map(Bytes::from).map_err(|error| failed(reference, &error))
    }
}

/// Where the outputs of a request go that don't go into the response.
#[derive(Debug, Default)]
pub struct Placements(Vec<Placement>);

#[derive(Debug)]
struct Placement {
    output: String,
    region: Arc<Region>,
    reference: Reference,
}

impl Placements {
    /// Moves outputs out of a response. As with Triton, one that is gone leaves an empty entry of raw contents behind, so
    /// that the others keep their places, and says nothing of where it went: the caller said that itself.
    ///
    /// # Errors
    /// [`SharedMemoryError::NoRoom`], [`SharedMemoryError::Failed`].
    pub fn apply(&self, response: &mut ModelInferResponse) -> Result<(), SharedMemoryError> {
        for Placement { output, region, reference } in &self.0 {
            let Some(index) = response.outputs.iter().position(|tensor| tensor.name == *output) else { continue };
            let Some(contents) = response.raw_output_contents.get_mut(index) else { continue };
            let data = std::mem::take(contents);
            let (room, needed) = (reference.byte_size, data.len() as u64);
            if needed > room {
                return Err(SharedMemoryError::NoRoom { output: short(output), room, needed });
            }
            // A write beyond the end of an object that lost some would make it longer again.
            let written =
                region.check(reference).and_then(|()| region.object.write_all_at(&data, region.offset + reference.offset));
            written.map_err(|error| failed(reference, &error))?;
        }
        Ok(())
    }
}

impl Region {
    fn status(&self) -> RegionStatus {
        let Self { name, key, offset, byte_size, .. } = self;
        RegionStatus { name: name.clone(), key: key.clone(), offset: *offset, byte_size: *byte_size }
    }

    fn object_bytes(&self) -> io::Result<u64> {
        Ok(self.object.metadata()?.len())
    }

    /// Whether the object still has the bytes that it had when the region was registered.
    fn check(&self, reference: &Reference) -> io::Result<()> {
        // Neither sum overflows: the place lies in the region, and the region lay in the object.
        let end = self.offset + reference.offset + reference.byte_size;
        if end <= self.object_bytes()? { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// A key is one name, behind the slash that POSIX wants before it.
fn check_key(key: &str) -> Result<(), RegionError> {
    let name = key.strip_prefix('/').unwrap_or(key);
    let plain = !name.contains(['/', '\0']) && name != "." && name != "..";
    if plain && (1..=KEY_BYTES_MAX).contains(&name.len()) { Ok(()) } else { Err(RegionError::Key(short(key))) }
}

fn open(key: &str) -> Result<File, RegionError> {
    let opened = shm::open(key, shm::OFlags::RDWR, shm::Mode::empty()).map_err(io::Error::from);
    let file = File::from(opened.map_err(|error| cannot_open(key, &error))?);
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => Err(RegionError::Open { key: short(key), text: "it is not a shared memory object".into() }),
        Err(error) => Err(cannot_open(key, &error)),
    }
}

fn cannot_open(key: &str, error: &io::Error) -> RegionError {
    RegionError::Open { key: short(key), text: error.kind().to_string() }
}

fn failed(reference: &Reference, error: &io::Error) -> SharedMemoryError {
    SharedMemoryError::Failed { region: short(&reference.region), text: error.kind().to_string() }
}

#[cfg(test)]
mod tests;
