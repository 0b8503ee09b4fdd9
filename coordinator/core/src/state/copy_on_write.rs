//! A value that is copied when it is changed, and only if somebody else still looks at it.
use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

/// A large part of the state. To clone it costs nothing, so that whoever needs a while to look at the state can have one of their own;
/// the first change after that copies the part that it changes, if the clone is still there.
///
/// It reads and is written as the value that it holds.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CopyOnWrite<T>(Arc<T>);

impl<T> Clone for CopyOnWrite<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Deref for CopyOnWrite<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Clone> DerefMut for CopyOnWrite<T> {
    fn deref_mut(&mut self) -> &mut T {
        Arc::make_mut(&mut self.0)
    }
}

impl<T> From<T> for CopyOnWrite<T> {
    fn from(value: T) -> Self {
        Self(Arc::new(value))
    }
}

impl<'a, T> IntoIterator for &'a CopyOnWrite<T>
where
    &'a T: IntoIterator,
{
    type Item = <&'a T as IntoIterator>::Item;
    type IntoIter = <&'a T as IntoIterator>::IntoIter;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_copies_only_what_somebody_else_looks_at() {
        let mut value = CopyOnWrite::from(vec![1]);
        let first = value.as_ptr();
        value[0] = 2;
        assert_eq!(value.as_ptr(), first, "nobody else has it");
        let view = value.clone();
        assert_eq!(view.as_ptr(), first);
        value[0] = 3;
        assert_eq!((&*view, &*value), (&vec![2], &vec![3]));
        assert_eq!((&value).into_iter().sum::<i32>(), 3);
    }
}
