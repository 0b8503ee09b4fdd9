//! `config.pbtxt`: the corpus, cut up and put together again.
use std::panic::{AssertUnwindSafe, catch_unwind};

use cresset_proto::model_config::{effective, parse_pbtxt};
use cresset_worker::contract::Contract;
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};

use crate::{Cases, bounded, random, scramble};

const CORPUS: [&str; 3] =
    [include_str!("corpus/everything.pbtxt"), include_str!("corpus/sequences.pbtxt"), include_str!("corpus/decoupled.pbtxt")];
/// What numbers and words are replaced by.
const ODD: [&str; 16] = [
    "-1",
    "0",
    "1",
    "2147483647",
    "-2147483648",
    "9223372036854775807",
    "99999999999999999999",
    "1e400",
    "nan",
    "\"\"",
    "'\\x00'",
    "TYPE_INVALID",
    "{",
    "}",
    "[",
    "# to the end",
];

#[test]
fn any_configuration_is_read_or_refused_with_a_place() {
    let (mut read, mut served) = (0u64, 0u64);
    for case in Cases::new() {
        let mut random = random(case);
        let text = text(&mut random);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            bounded(case, text.len(), || match parse_pbtxt(&text) {
                Ok(config) => {
                    let _ = effective(&config, &[]);
                    match Contract::read(&config) {
                        Ok(contract) => {
                            assert!(contract.instances_total() >= 1);
                            (true, true)
                        }
                        Err(error) => {
                            assert!(error.to_string().len() > "config.pbtxt: ".len());
                            (true, false)
                        }
                    }
                }
                Err(error) => {
                    assert!(error.line >= 1 && error.column >= 1 && error.line <= text.lines().count() + 1, "{error}");
                    (false, false)
                }
            })
        }));
        let (was_read, was_served) = outcome.unwrap_or_else(|_| panic!("CRESSET_FUZZ_CASE={case}:\n{text}"));
        read += u64::from(was_read);
        served += u64::from(was_served);
    }
    // A fuzzer whose rubbish never gets past the parser tests only the parser.
    assert!(read > 0 && served > 0, "{read} were read, {served} of them could be served");
    println!("{read} configurations were read, {served} of them could be served");
}

fn text(random: &mut StdRng) -> String {
    let mut text = CORPUS.choose(random).copied().unwrap_or_default().to_owned();
    match random.random_range(0..4) {
        0 => {
            let mut bytes = text.into_bytes();
            scramble(&mut bytes, random);
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        1 => {
            let other = CORPUS.choose(random).copied().unwrap_or_default();
            text.push_str(other);
        }
        _ => {}
    }
    let mut words: Vec<&str> = text.split_inclusive([' ', '\n', '[', ']', '{', '}', ',']).collect();
    for _ in 0..random.random_range(0..6) {
        let at = random.random_range(0..words.len().max(1)).min(words.len().saturating_sub(1));
        match random.random_range(0..3) {
            0 if !words.is_empty() => drop(words.remove(at)),
            1 if !words.is_empty() => words[at] = ODD.choose(random).copied().unwrap_or("0"),
            _ => {
                let copy = words.choose(random).copied().unwrap_or("x");
                words.insert(at, copy);
            }
        }
    }
    words.concat()
}
