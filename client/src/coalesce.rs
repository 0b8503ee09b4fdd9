//! Writes that come one shortly after the other leave together.
//!
//! An HTTP/2 library writes a request in three pieces (headers, data, the end), each with a system call and a packet of its
//! own, and the other side is woken for each of them. Here a flush waits until all tasks that are ready have run, which is when
//! the pieces are there; nothing waits for time to pass.
use std::{
    io::{self, IoSlice},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is held back at most, in bytes; more is written at once.
const HELD_BYTES_MAX: usize = 32 << 10;
/// How often in a row a flush is put off while more keeps coming.
const PUT_OFF_MAX: u32 = 8;

/// A connection whose small writes are put together.
#[derive(Debug)]
pub struct Coalesced<I> {
    io: I,
    held: BytesMut,
    /// Something was written since the last flush.
    fresh: bool,
    put_off: u32,
}

impl<I> Coalesced<I> {
    /// Around a connection.
    pub fn new(io: I) -> Self {
        Self { io, held: BytesMut::new(), fresh: false, put_off: 0 }
    }
}

impl<I: AsyncWrite + Unpin> Coalesced<I> {
    fn poll_write_held(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.held))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.held.advance(written),
            }
        }
        (self.fresh, self.put_off) = (false, 0);
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Coalesced<I> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Coalesced<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let bytes: usize = slices.iter().map(|slice| slice.len()).sum();
        if self.held.len() + bytes > HELD_BYTES_MAX {
            ready!(self.poll_write_held(cx))?;
            if bytes > HELD_BYTES_MAX {
                return Pin::new(&mut self.io).poll_write_vectored(cx, slices);
            }
        }
        for slice in slices {
            self.held.extend_from_slice(slice);
        }
        self.fresh = true;
        Poll::Ready(Ok(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.fresh && self.put_off < PUT_OFF_MAX {
            self.fresh = false;
            self.put_off += 1;
            // Wakes the caller again once everything else that is ready has run.
            let again = pin!(tokio::task::yield_now()).poll(cx);
            if again.is_pending() {
                return Poll::Ready(Ok(()));
            }
        }
        ready!(self.poll_write_held(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_held(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn what_is_written_shortly_after_one_another_leaves_together() {
        let (near, mut far) = duplex(1 << 20);
        let mut near = Coalesced::new(near);
        let mut buffer = [0; 64];
        for piece in ["head", "data", "end"] {
            near.write_all(piece.as_bytes()).await.unwrap();
            near.flush().await.unwrap();
        }
        // Nobody drives the flush here as a connection's task does, so it is asked for again.
        near.flush().await.unwrap();
        let read = far.read(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..read], b"headdataend");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_is_woken_by_its_own_flush_gets_everything_out() {
        let (near, mut far) = duplex(1 << 20);
        let mut near = Coalesced::new(near);
        let mut written = false;
        let driven = std::future::poll_fn(move |cx| {
            if !written {
                written = true;
                assert!(Pin::new(&mut near).poll_write(cx, b"alone").is_ready());
            }
            // As an HTTP/2 connection: a flush at the end of every poll, and nothing that would wake it again.
            assert!(Pin::new(&mut near).poll_flush(cx).is_ready());
            Poll::<()>::Pending
        });
        let driven = tokio::spawn(driven);
        let mut buffer = [0; 5];
        tokio::time::timeout(Duration::from_secs(1), far.read_exact(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(&buffer, b"alone");
        driven.abort();
    }

    #[tokio::test]
    async fn much_is_written_at_once_and_in_order() {
        let (near, mut far) = duplex(4096);
        let mut near = Coalesced::new(near);
        let sent: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            let mut rest = &sent[..];
            for size in [1, 100, 40_000, 3, 32_768, 50_000].into_iter().cycle() {
                let (piece, after) = rest.split_at(size.min(rest.len()));
                near.write_all(piece).await.unwrap();
                near.flush().await.unwrap();
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            near.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        far.read_to_end(&mut received).await.unwrap();
        writer.await.unwrap();
        assert!(received == expected);
    }
}
