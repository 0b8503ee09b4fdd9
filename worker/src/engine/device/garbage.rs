//! Freeing models away from the devices' threads: giving a large model's memory back takes milliseconds.

use std::sync::OnceLock;

use tokio::sync::{mpsc, oneshot};

use crate::engine::priority;

/// Things that may wait to be freed. Whatever comes beyond is freed by whoever drops it.
const GARBAGE_MAX: usize = 1024;

enum Garbage {
    Value { value: Box<dyn Send>, is_large: bool },
    Marker(oneshot::Sender<()>),
}

/// Frees something on the thread for it. After something large the memory goes back to the system: libtorch allocates with
/// malloc, which keeps what is freed.
pub(super) fn free(value: Box<dyn Send>, is_large: bool) {
    if let Some(freer) = freer() {
        // If that thread is gone or behind, the error gives the value back and it is freed right here.
        drop(freer.try_send(Garbage::Value { value, is_large }));
    }
}

/// Returns once everything that was dropped before this call has been freed, and its memory given back to the system.
pub async fn freed() {
    let (marker, done) = oneshot::channel();
    if let Some(freer) = freer()
        && freer.send(Garbage::Marker(marker)).await.is_ok()
    {
        // An error means that the thread is gone: nothing is waiting for it then.
        let _ = done.await;
    }
}

fn freer() -> Option<&'static mpsc::Sender<Garbage>> {
    static FREER: OnceLock<Option<mpsc::Sender<Garbage>>> = OnceLock::new();
    let start = || {
        let (sender, garbage) = mpsc::channel(GARBAGE_MAX);
        let thread = std::thread::Builder::new().name("engine-free".into()).spawn(move || serve(garbage));
        thread.is_ok().then_some(sender)
    };
    FREER.get_or_init(start).as_ref()
}

fn serve(mut garbage: mpsc::Receiver<Garbage>) {
    priority::stand_back("freeing");
    let mut together = Vec::with_capacity(GARBAGE_MAX);
    while garbage.blocking_recv_many(&mut together, GARBAGE_MAX) > 0 {
        let mut any_large = false;
        let mut markers = Vec::new();
        for one in together.drain(..) {
            match one {
                Garbage::Value { value, is_large } => {
                    any_large |= is_large;
                    drop(value);
                }
                Garbage::Marker(marker) => markers.push(marker),
            }
        }
        if any_large {
            crate::engine::torch::give_memory_back();
        }
        for marker in markers {
            // Whoever waited may have gone.
            let _ = marker.send(());
        }
    }
}
