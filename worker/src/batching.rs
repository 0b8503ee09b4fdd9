//! When to cut a batch, and from what. Pure: the queue asks, time comes in as a value.
//!
//! An idle device never waits for a fuller batch unless the model's configuration tells it to
//! (`max_queue_delay_microseconds`). Requests of one batch have equal shapes beyond the batch dimension; the oldest request
//! decides which shape goes next, so none starves.

/// A request in the queue, as far as batching cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// When it came, in µs of the process's clock.
    pub arrived_us: u64,
    /// Rows that it takes of a batch.
    pub rows: usize,
    /// Equal for requests that fit into one batch.
    pub shape_class: u64,
}

/// Bounds of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rows of one batch; 0: the model has no batch dimension and runs one request at a time.
    pub rows_max: usize,
    /// How long the oldest request may wait for a fuller batch, in µs.
    pub delay_us: u64,
}

/// What to do with a queue when its device is free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Nothing waits.
    Idle,
    /// Ask again at this time, or when a request comes.
    WaitUntil(u64),
    /// Run the requests at these positions, ascending; the first is always 0.
    Cut(Vec<usize>),
}

/// Decides, at `now_us`, over a queue in order of arrival.
pub fn decide(queue: &[Waiting], limits: &Limits, now_us: u64) -> Decision {
    let Some(oldest) = queue.first() else { return Decision::Idle };
    let mut chosen = vec![0];
    let mut rows = oldest.rows;
    for (position, request) in queue.iter().enumerate().skip(1) {
        if rows >= limits.rows_max {
            break;
        }
        let fits = rows.checked_add(request.rows).is_some_and(|sum| sum <= limits.rows_max);
        if request.shape_class != oldest.shape_class {
            continue;
        }
        // The first that doesn't fit ends the batch: a later, smaller one must not overtake it for ever.
        if !fits {
            rows = limits.rows_max;
            break;
        }
        chosen.push(position);
        rows += request.rows;
    }
    let wait_until_us = oldest.arrived_us.saturating_add(limits.delay_us);
    if rows >= limits.rows_max || wait_until_us <= now_us { Decision::Cut(chosen) } else { Decision::WaitUntil(wait_until_us) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn waiting(rows: usize, shape_class: u64) -> Waiting {
        Waiting { arrived_us: 100, rows, shape_class }
    }

    #[test]
    fn an_idle_device_takes_whatever_is_there_at_once() {
        let limits = Limits { rows_max: 8, delay_us: 0 };
        assert_eq!(decide(&[], &limits, 100), Decision::Idle);
        assert_eq!(decide(&[waiting(1, 0)], &limits, 100), Decision::Cut(vec![0]));
        assert_eq!(decide(&[waiting(3, 0), waiting(3, 0), waiting(3, 0)], &limits, 100), Decision::Cut(vec![0, 1]));
    }

    #[test]
    fn a_delay_waits_for_a_fuller_batch_and_no_longer() {
        let limits = Limits { rows_max: 4, delay_us: 50 };
        assert_eq!(decide(&[waiting(1, 0)], &limits, 120), Decision::WaitUntil(150));
        assert_eq!(decide(&[waiting(1, 0)], &limits, 150), Decision::Cut(vec![0]));
        assert_eq!(decide(&[waiting(2, 0), waiting(2, 0)], &limits, 100), Decision::Cut(vec![0, 1]));
        assert_eq!(decide(&[waiting(2, 0), waiting(3, 0)], &limits, 100), Decision::Cut(vec![0]));
    }

    #[test]
    fn shapes_are_not_mixed_and_the_oldest_goes_first() {
        let limits = Limits { rows_max: 8, delay_us: 0 };
        assert_eq!(decide(&[waiting(1, 7), waiting(1, 9), waiting(1, 7)], &limits, 100), Decision::Cut(vec![0, 2]));
    }

    #[test]
    fn without_a_batch_dimension_requests_go_one_by_one() {
        let limits = Limits { rows_max: 0, delay_us: 1000 };
        assert_eq!(decide(&[waiting(1, 0), waiting(1, 0)], &limits, 100), Decision::Cut(vec![0]));
    }

    proptest! {
        #[test]
        fn a_cut_holds_the_oldest_one_shape_and_no_more_rows_than_allowed(
            queue in prop::collection::vec((0u64..200, 0usize..9, 0u64..3), 0..20),
            rows_max in 0usize..8, delay_us in 0u64..100, now_us in 0u64..300,
        ) {
            let queue: Vec<Waiting> =
                queue.into_iter().map(|(arrived_us, rows, shape_class)| Waiting { arrived_us, rows, shape_class }).collect();
            match decide(&queue, &Limits { rows_max, delay_us }, now_us) {
                Decision::Idle => prop_assert!(queue.is_empty()),
                Decision::WaitUntil(at) => prop_assert!(at > now_us && delay_us > 0),
                Decision::Cut(positions) => {
                    prop_assert_eq!(positions[0], 0);
                    prop_assert!(positions.windows(2).all(|pair| pair[0] < pair[1]));
                    prop_assert!(positions.iter().all(|at| queue[*at].shape_class == queue[0].shape_class));
                    let rows: usize = positions.iter().map(|at| queue[*at].rows).sum();
                    prop_assert!(rows <= rows_max || positions.len() == 1);
                }
            }
        }
    }
}
