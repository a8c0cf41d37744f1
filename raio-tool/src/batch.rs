//! Several things that are done one after another: a failure of one is said, and the others go on.

use crate::failure::{Failure, Kind};
use crate::output;

/// How many have failed, and why.
#[derive(Debug, Default)]
pub struct Batch {
    failed: u64,
    /// The first failure, as long as it is the only one.
    first: Option<Failure>,
    /// What kind all failures are of; Other if they differ.
    kind: Option<Kind>,
}

impl Batch {
    /// Takes note of how one has ended. It fails if no other can succeed.
    pub fn note(&mut self, ended: Result<(), Failure>) -> Result<(), Failure> {
        let Err(failure) = ended else { return Ok(()) };
        if failure.is_final() {
            return Err(failure);
        }
        self.failed += 1;
        let kind = failure.kind();
        self.kind = Some(self.kind.map_or(kind, |all| if all == kind { kind } else { Kind::Other }));
        if self.failed == 1 {
            self.first = Some(failure);
            return Ok(());
        }
        if let Some(first) = self.first.take() {
            output::say(&format!("raio: {first}"));
        }
        output::say(&format!("raio: {failure}"));
        Ok(())
    }

    /// Does something for each of them. Fails if no other can succeed, and in the end if one has failed.
    pub fn each<T>(
        items: impl IntoIterator<Item = T>,
        act: impl FnMut(T) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut batch = Self::default();
        items.into_iter().map(act).try_for_each(|ended| batch.note(ended))?;
        batch.finish()
    }

    /// All were done: the failure that the command ends with, if one has failed.
    pub fn finish(self) -> Result<(), Failure> {
        match (self.first, self.kind) {
            (Some(failure), _) => Err(failure),
            (None, Some(kind)) => Err(Failure::of(kind, format!("{} have failed.", self.failed))),
            (None, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_the_result_and_several_are_counted() {
        let failure = |kind| Err(Failure::of(kind, "No."));
        let mut one = Batch::default();
        one.note(failure(Kind::NotFound)).unwrap();
        one.note(Ok(())).unwrap();
        assert_eq!(one.finish().unwrap_err().kind(), Kind::NotFound);
        for (second, all) in [(Kind::NotFound, Kind::NotFound), (Kind::Refused, Kind::Other)] {
            let mut both = Batch::default();
            both.note(failure(Kind::NotFound)).unwrap();
            both.note(failure(second)).unwrap();
            let failure = both.finish().unwrap_err();
            assert!(failure.kind() == all && failure.to_string().starts_with("2 "), "{failure}");
        }
        Batch::default().finish().unwrap();
        assert!(Batch::default().note(failure(Kind::Interrupted)).is_err(), "nothing else is begun");
    }
}
