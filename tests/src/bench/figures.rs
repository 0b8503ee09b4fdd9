//! Figures of several rounds: the middle, the spread, and the JSON that programs read. Pure.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// One part of the results: figures that were measured in every round, facts about them, and all that was seen.
#[derive(Debug, Clone, Default)]
pub struct Part {
    figures: BTreeMap<String, Vec<f64>>,
    facts: Map<String, Value>,
    raw: Vec<Value>,
}

/// The middle of some numbers, between the two middle ones of an even count; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

impl Part {
    /// Adds a round's value of a figure.
    pub fn add(&mut self, name: &str, value: f64) {
        self.figures.entry(name.to_owned()).or_default().push(value);
    }

    /// A figure by another name too.
    pub fn copy(&mut self, from: &str, to: &str) {
        if let Some(values) = self.figures.get(from).cloned() {
            self.figures.insert(to.to_owned(), values);
        }
    }

    /// Notes something that isn't measured in rounds.
    pub fn fact(&mut self, name: &str, value: impl Into<Value>) {
        self.facts.insert(name.to_owned(), value.into());
    }

    /// Keeps what was seen.
    pub fn raw(&mut self, what: &str, round: usize, seen: &impl serde::Serialize) {
        self.raw.push(json!({"what": what, "round": round, "seen": seen}));
    }

    /// The rounds of a figure.
    pub fn rounds(&self, name: &str) -> &[f64] {
        self.figures.get(name).map_or(&[], Vec::as_slice)
    }

    /// The middle of a figure, if it was measured.
    pub fn median(&self, name: &str) -> Option<f64> {
        Some(self.rounds(name)).filter(|rounds| !rounds.is_empty()).map(median)
    }

    /// A fact.
    pub fn known(&self, name: &str) -> Option<&Value> {
        self.facts.get(name)
    }

    /// The lowest and the highest round of a figure.
    pub fn spread(&self, name: &str) -> Option<(f64, f64)> {
        let rounds = self.rounds(name);
        let fold = |least: fn(f64, f64) -> f64| rounds.iter().copied().reduce(least);
        fold(f64::min).zip(fold(f64::max))
    }

    /// Each figure's middle by its name, beside the facts, all rounds and all that was seen.
    pub fn to_json(&self) -> Value {
        let mut json = self.facts.clone();
        json.extend(self.figures.iter().map(|(name, rounds)| (name.clone(), json!(median(rounds)))));
        json.insert("rounds".to_owned(), json!(self.figures));
        json.insert("raw".to_owned(), json!(self.raw));
        Value::Object(json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_not_moved_by_one_bad_round() {
        assert!((median(&[3.0, 900.0, 1.0]) - 3.0).abs() < f64::EPSILON);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_part_tells_middles_rounds_and_facts() {
        let mut part = Part::default();
        [5.0, 1.0, 3.0].iter().for_each(|value| part.add("p50_us", *value));
        part.fact("cores", 2);
        part.copy("p50_us", "best");
        part.raw("alone", 0, &json!({"x": 1}));
        assert_eq!((part.median("p50_us"), part.spread("p50_us")), (Some(3.0), Some((1.0, 5.0))));
        assert_eq!((part.median("other"), part.spread("other")), (None, None));
        let json = part.to_json();
        assert_eq!((&json["p50_us"], &json["best"], &json["cores"]), (&json!(3.0), &json!(3.0), &json!(2)));
        assert_eq!(json["rounds"]["p50_us"], json!([5.0, 1.0, 3.0]));
        assert_eq!(json["raw"][0], json!({"what": "alone", "round": 0, "seen": {"x": 1}}));
    }
}
