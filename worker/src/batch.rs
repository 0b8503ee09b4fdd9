//! From requests to one call of the model, and from what it returned to each request's answer.
//!
//! Nothing is copied here: an input is the requests' bytes one after the other (the engine copies them once), an answer is
//! a slice of the result's own memory.
use std::hash::{DefaultHasher, Hash, Hasher};

use bytes::Bytes;
use cresset_proto::tensor::{Datatype, Tensor, element_count};

use crate::{
    admission::{Admitted, WantedOutput, reshaped},
    classify,
    contract::{Contract, OutputSpec},
    engine::{InputParts, OutputTensor},
    error::PredictError,
    ragged,
};

/// Requests whose shapes differ beyond the batch, or that leave out different inputs, can't share a batch. Equal hashes of
/// different shapes would make a batch fail, and its requests would then be run one by one: correct, and too rare to be
/// paid for with a comparison.
pub fn shape_class(contract: &Contract, admitted: &Admitted) -> u64 {
    let batch = usize::from(contract.batch_rows_max > 0);
    let mut hasher = DefaultHasher::new();
    for (at, tensor) in admitted.inputs.iter().enumerate() {
        let is_ragged = contract.inputs.get(at).is_some_and(|spec| spec.ragged);
        // Elements of a ragged input are laid one after the other, whatever their shapes; only the rank has to agree.
        let shape = tensor.as_ref().map(|tensor| tensor.shape.get(batch..).unwrap_or_default());
        match (is_ragged, shape) {
            (true, Some(shape)) => shape.len().hash(&mut hasher),
            (_, shape) => shape.hash(&mut hasher),
        }
    }
    hasher.finish()
}

/// The inputs of one call, in the engine's order: callers' inputs, what is computed from the batch, then whatever stands
/// behind the callers' inputs in each request (controls and state of sequences).
pub fn assemble(contract: &Contract, batch: &[&Admitted]) -> Vec<InputParts> {
    let Some(first) = batch.first() else { return vec![] };
    let rows: i64 = batch.iter().map(|admitted| i64::try_from(admitted.rows).unwrap_or(i64::MAX)).sum();
    let declared = contract.inputs.len();
    let column = |at: usize| batch.iter().filter_map(move |admitted| admitted.inputs.get(at).and_then(Option::as_ref));
    let input = |at: usize| {
        let Some(Some(tensor)) = first.inputs.get(at) else {
            return InputParts::absent(contract.inputs.get(at).map_or(Datatype::Uint8, |spec| spec.datatype));
        };
        let is_ragged = contract.inputs.get(at).is_some_and(|spec| spec.ragged);
        let mut shape = tensor.shape.clone();
        if is_ragged {
            let elements = column(at).filter_map(|tensor| element_count(&tensor.shape)).sum::<usize>();
            shape = vec![i64::try_from(elements).unwrap_or(i64::MAX)];
        } else if batch.len() > 1
            && let Some(dim) = shape.first_mut()
        {
            *dim = rows;
        }
        InputParts { datatype: tensor.datatype, shape, parts: column(at).map(|tensor| tensor.data.clone()).collect() }
    };
    let computed = contract.batch_inputs.iter().map(|spec| {
        let shapes: Vec<&[i64]> = column(spec.source).map(|tensor| &tensor.shape[..]).collect();
        let ragged::Computed { shape, data } = ragged::compute(spec.kind, spec.datatype, &shapes);
        InputParts { datatype: spec.datatype, shape, parts: vec![data] }
    });
    (0..declared).map(input).chain(computed).chain((declared..first.inputs.len()).map(input)).collect()
}

/// What a call returned, ready to be cut into answers.
pub struct Cut<'a> {
    contract: &'a Contract,
    outputs: &'a [OutputTensor],
    rows: usize,
    /// For BYTES outputs, where each element begins, and the end.
    elements: Vec<Option<Vec<usize>>>,
}

/// The part of a batch that belongs to one request.
#[derive(Debug, Clone, Copy)]
pub struct Share<'a> {
    /// The request.
    pub admitted: &'a Admitted,
    /// Its first row.
    pub row: usize,
    /// The first element of it in each output that is scattered like an input, by input.
    scattered: &'a [(usize, usize)],
}

/// Cuts the results of a batch and gives each request its answer, in order.
pub fn answers(contract: &Contract, batch: &[&Admitted], outputs: &[OutputTensor]) -> Vec<Result<Vec<Tensor>, PredictError>> {
    let rows = batch.iter().map(|admitted| admitted.rows).sum();
    let cut = Cut { contract, outputs, rows, elements: outputs.iter().map(element_starts).collect() };
    let mut row = 0;
    let mut starts: Vec<(usize, usize)> =
        contract.outputs.iter().filter_map(|spec| spec.scattered_like).map(|source| (source, 0)).collect();
    let mut answers = Vec::with_capacity(batch.len());
    for admitted in batch {
        answers.push(cut.answer(Share { admitted, row, scattered: &starts }));
        row += admitted.rows;
        for (source, start) in &mut starts {
            *start += elements_of(admitted, *source);
        }
    }
    answers
}

fn elements_of(admitted: &Admitted, input: usize) -> usize {
    let tensor = admitted.inputs.get(input).and_then(Option::as_ref);
    tensor.and_then(|tensor| element_count(&tensor.shape)).unwrap_or(0)
}

/// Where each element of a BYTES output begins, and the end; `None` for other types or broken framing.
fn element_starts(output: &OutputTensor) -> Option<Vec<usize>> {
    if output.datatype != Datatype::Bytes {
        return None;
    }
    let mut starts = vec![0];
    let mut at = 0;
    while at < output.data.len() {
        let length = output.data.get(at..at + 4)?.try_into().map(u32::from_le_bytes).ok()?;
        at = at.checked_add(4)?.checked_add(length as usize)?;
        starts.push(at);
    }
    (at == output.data.len()).then_some(starts)
}

impl Cut<'_> {
    fn answer(&self, share: Share<'_>) -> Result<Vec<Tensor>, PredictError> {
        share.admitted.outputs.iter().map(|wanted| self.output(*wanted, share)).collect()
    }

    fn broken(&self, text: String) -> PredictError {
        PredictError::BrokenPromise { model: self.contract.name.clone(), text }
    }

    fn output(&self, wanted: WantedOutput, share: Share<'_>) -> Result<Tensor, PredictError> {
        let declared = self.contract.outputs.get(wanted.index);
        let (name, datatype) = match declared {
            Some(spec) => (&spec.name, spec.datatype),
            None => match self.contract.states().get(wanted.index - self.contract.outputs.len()) {
                Some(state) => (&state.output, state.datatype),
                None => return Err(self.broken(format!("there is no output {}", wanted.index))),
            },
        };
        let Some(output) = self.outputs.get(wanted.index) else {
            let (returned, expected) = (self.outputs.len(), self.contract.outputs.len() + self.contract.states().len());
            return Err(self.broken(format!("forward returned {returned} outputs, the configuration declares {expected}")));
        };
        if output.datatype != datatype {
            let got = output.datatype;
            return Err(self.broken(format!("output '{name}' came out as {got}, the configuration declares {datatype}")));
        }
        let wrong = || {
            let (shape, rows) = (&output.shape, self.rows);
            self.broken(format!("output '{name}' has the shape {shape:?} for a batch of {rows}"))
        };
        let (shape, data) = match (declared, datatype) {
            (Some(spec), _) if spec.scattered_like.is_some() => self.scattered(spec, output, share).ok_or_else(wrong)?,
            (_, Datatype::Bytes) => {
                let starts = self.elements.get(wanted.index).and_then(Option::as_ref);
                self.strings(declared, output, starts.ok_or_else(wrong)?, share).ok_or_else(wrong)?
            }
            _ => self.rows_of(output, share).ok_or_else(wrong)?,
        };
        let shape = match declared.and_then(|spec| spec.reshape.as_ref().map(|reshape| (spec, reshape))) {
            Some((spec, reshape)) => self.reshaped(spec, reshape, &shape).ok_or_else(wrong)?,
            None => shape,
        };
        let name = name.clone();
        if wanted.classes == 0 {
            return Ok(Tensor { name, datatype, shape, data });
        }
        let rows = if self.contract.batch_rows_max > 0 { share.admitted.rows } else { 1 };
        let labels = self.contract.labels.get(wanted.index).map_or(&[][..], Vec::as_slice);
        let (data, classes) = classify::best(datatype, &data, rows, wanted.classes, labels);
        let batch = (self.contract.batch_rows_max > 0).then_some(rows);
        let shape = batch.into_iter().chain([classes]).map(|dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect();
        Ok(Tensor { name, datatype: Datatype::Bytes, shape, data })
    }

    /// The request's rows of an output whose first dimension is the batch.
    fn rows_of(&self, output: &OutputTensor, share: Share<'_>) -> Option<(Vec<i64>, Bytes)> {
        if self.contract.batch_rows_max == 0 {
            return Some((output.shape.clone(), output.data.clone()));
        }
        let (dim, rest) = output.shape.split_first()?;
        if usize::try_from(*dim).ok()? != self.rows {
            return None;
        }
        let row_bytes = output.data.len().checked_div(self.rows).unwrap_or(0);
        let mut shape = Vec::with_capacity(output.shape.len());
        shape.push(i64::try_from(share.admitted.rows).ok()?);
        shape.extend_from_slice(rest);
        let (start, end) = (share.row * row_bytes, (share.row + share.admitted.rows) * row_bytes);
        Some((shape, output.data.slice(start..end)))
    }

    /// The request's strings. TorchScript returns them as a flat list, so the configuration's dims give the shape.
    fn strings(
        &self,
        spec: Option<&OutputSpec>,
        output: &OutputTensor,
        starts: &[usize],
        share: Share<'_>,
    ) -> Option<(Vec<i64>, Bytes)> {
        let total = starts.len() - 1;
        let (rows, first, count) = match self.contract.batch_rows_max {
            0 => (None, 0, total),
            _ => {
                let each = total.checked_div(self.rows).filter(|each| each * self.rows == total)?;
                (Some(share.admitted.rows), share.row * each, share.admitted.rows * each)
            }
        };
        let data = output.data.slice(*starts.get(first)?..*starts.get(first + count)?);
        let dims = spec.map_or(&[-1][..], |spec| spec.reshape.as_ref().unwrap_or(&spec.dims));
        let each = count.checked_div(rows.unwrap_or(1)).unwrap_or(0);
        let mut shape: Vec<i64> = rows.map(|rows| i64::try_from(rows).unwrap_or(i64::MAX)).into_iter().collect();
        shape.extend(filled(dims, each)?);
        Some((shape, data))
    }

    /// The request's elements of an output that is laid out like an input: Triton's BATCH_SCATTER_WITH_INPUT_SHAPE.
    fn scattered(&self, spec: &OutputSpec, output: &OutputTensor, share: Share<'_>) -> Option<(Vec<i64>, Bytes)> {
        let source = spec.scattered_like?;
        let tensor = share.admitted.inputs.get(source)?.as_ref()?;
        let element_bytes = output.datatype.size()?;
        let start = share.scattered.iter().find(|(input, _)| *input == source)?.1;
        let end = start.checked_add(element_count(&tensor.shape)?)?;
        if end.checked_mul(element_bytes)? > output.data.len() {
            return None;
        }
        Some((tensor.shape.clone(), output.data.slice(start * element_bytes..end * element_bytes)))
    }

    fn reshaped(&self, spec: &OutputSpec, reshape: &[i64], shape: &[i64]) -> Option<Vec<i64>> {
        let batch = usize::from(self.contract.batch_rows_max > 0);
        let dims = shape.get(batch..)?;
        let fits = dims.len() == reshape.len() && dims.iter().zip(reshape).all(|(dim, wanted)| *wanted == -1 || dim == wanted);
        fits.then(|| reshaped(shape, batch, reshape, &spec.dims))
    }
}

/// Dimensions with at most one free one filled in, so that they hold `count` elements.
fn filled(dims: &[i64], count: usize) -> Option<Vec<i64>> {
    let fixed = element_count(&dims.iter().copied().filter(|dim| *dim >= 0).collect::<Vec<_>>())?;
    let free = dims.iter().filter(|dim| **dim < 0).count();
    match free {
        0 if fixed == count => Some(dims.to_vec()),
        1 if fixed > 0 && count.is_multiple_of(fixed) => {
            let open = i64::try_from(count / fixed).ok()?;
            Some(dims.iter().map(|dim| if *dim < 0 { open } else { *dim }).collect())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
