//! The processes of an MPI job: collectives with typed errors, and a count of the bytes they carry.

use super::Scalar;
use crate::attention::shards::RowShards;
use crate::error::{Error, Result};
use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::{CommunicatorCollectives, Destination, Equivalence, Source};
use ndarray::Array2;
use std::cell::Cell;
use std::time::Duration;

/// A running MPI job. Dropping it ends MPI in this process: keep it until the last message.
pub struct Job {
    // Before the universe, so that its communicators are freed while MPI runs.
    ranks: Ranks,
    _universe: Universe,
}

/// What a launcher sets for each process: Open MPI, PMIx (srun and others), PMI (MPICH, Intel MPI,
/// srun).
const LAUNCHERS: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE"];
/// Where it says how many processes it started.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

impl Job {
    /// The job that an MPI launcher started, or `None` for a process started by itself.
    ///
    /// # Errors
    /// [`Error::Mpi`] when the library cannot be used from a program with threads, or sees fewer
    /// processes than the launcher started: each would then do everything, over the others' files.
    pub fn launched() -> Result<Option<Self>> {
        let started = SIZES
            .iter()
            .find_map(|name| std::env::var(name).ok()?.parse::<usize>().ok())
            .unwrap_or(1);
        if started < 2 && LAUNCHERS.iter().all(|name| std::env::var_os(name).is_none()) {
            return Ok(None);
        }
        // Only the thread that starts MPI calls it; rayon's threads compute.
        let refused = |reason: &str| Error::Mpi { op: "start", reason: reason.into() };
        let (universe, threading) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or_else(|| refused("it was already started in this process"))?;
        if threading < Threading::Funneled {
            return Err(refused("the library allows no threads beside the one that calls it"));
        }
        let world = universe.world();
        let (rank, size) = (world.rank(), world.size());
        if (size as usize) < started {
            return Err(refused(&format!(
                "the launcher started {started} processes but this program's MPI library sees \
                 {size}; use the launcher of that library, with Slurm srun --mpi=pmix or --mpi=pmi2"
            )));
        }
        // Ranks in the opposite order: a prefix sum there is a suffix sum here.
        let reversed = world
            .split_by_color_with_key(mpi::topology::Color::with_value(0), size - rank)
            .ok_or_else(|| refused("no communicator with the ranks reversed"))?;
        let ranks = Ranks { world: world.duplicate(), reversed, traffic: Cell::default() };
        Ok(Some(Self { ranks, _universe: universe }))
    }

    /// Its ranks.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Ends every process of the job with an exit code; for a failure that the other ranks cannot
    /// know of.
    pub fn abort(&self, code: u8) -> ! {
        self.ranks.world.abort(i32::from(code))
    }
}

impl Drop for Job {
    /// A rank that panics ends the job: MPI's own end would wait for the others, and they for it.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(101);
        }
    }
}

/// Bytes that this rank handed to MPI.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Length of the vectors summed over all ranks. A ring or tree all-reduce of n bytes sends and
    /// receives 2 (p - 1) / p n of them on each of p ranks.
    pub reduced: u64,
    /// Length of the vectors of prefix and suffix sums.
    pub scanned: u64,
    /// Sent to one other rank.
    pub sent: u64,
    /// Length of the few numbers by which ranks agree: counts, maxima, means, failures.
    pub control: u64,
    /// Calls and messages.
    pub messages: u64,
}

/// All processes of a job, as one of them sees them.
pub struct Ranks {
    world: SimpleCommunicator,
    reversed: SimpleCommunicator,
    traffic: Cell<Traffic>,
}

/// Numbers in one message: MPI counts in 32 bits, and the copy that a sum needs stays small.
const MESSAGE: usize = 1 << 22;

impl Ranks {
    /// This process, from 0.
    pub fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    /// Number of processes.
    pub fn size(&self) -> usize {
        self.world.size() as usize
    }

    /// Whether this process speaks for the job.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// What has been moved so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic.get()
    }

    fn count(&self, change: impl FnOnce(&mut Traffic)) {
        let mut traffic = self.traffic.get();
        change(&mut traffic);
        self.traffic.set(traffic);
    }

    /// Waits for every rank.
    pub fn barrier(&self) {
        self.world.barrier();
    }

    fn reduce_with<T: Equivalence + Clone>(&self, values: &mut [T], operation: SystemOperation) {
        for part in values.chunks_mut(MESSAGE) {
            let own = part.to_vec();
            self.world.all_reduce_into(&own[..], part, operation);
            self.count(|t| t.messages += 1);
        }
    }

    /// [`Ranks::reduce_with`] for a few numbers.
    fn control<T: Equivalence + Clone>(&self, values: &mut [T], operation: SystemOperation) {
        let bytes = size_of_val(values) as u64;
        self.reduce_with(values, operation);
        self.count(|t| t.control += bytes);
    }

    fn scan<T: Scalar>(&self, over: &SimpleCommunicator, values: &mut [T]) {
        for part in values.chunks_mut(MESSAGE) {
            let own = part.to_vec();
            part.fill(T::zero());
            over.exclusive_scan_into(&own[..], part, SystemOperation::sum());
            if over.rank() == 0 {
                // MPI leaves it undefined.
                part.fill(T::zero());
            }
            self.count(|t| {
                t.scanned += size_of_val(part) as u64;
                t.messages += 1;
            });
        }
    }

    /// One number of every rank, in order.
    pub fn gather_counts(&self, own: usize) -> Vec<usize> {
        let mut all = vec![0u64; self.size()];
        self.world.all_gather_into(&(own as u64), &mut all[..]);
        self.count(|t| {
            t.control += size_of::<u64>() as u64;
            t.messages += 1;
        });
        all.into_iter().map(|n| n as usize).collect()
    }

    /// Makes sure that all ranks work on the same task, as far as `description` tells.
    ///
    /// # Errors
    /// [`Error::Mpi`] on every rank.
    pub fn require_same(&self, op: &'static str, description: &str) -> Result<()> {
        let digest = crate::streams::sha256(description.as_bytes());
        let own = i64::from_le_bytes(std::array::from_fn(|i| digest[i])) >> 2;
        let mut largest = [own, -own];
        self.control(&mut largest, SystemOperation::max());
        if largest[0] == -largest[1] {
            return Ok(());
        }
        Err(Error::Mpi {
            op,
            reason: format!("the ranks were given different tasks; this one's is {description}"),
        })
    }

    /// Sends all of `block` to the next rank and receives the previous rank's, whose shape is
    /// `shape`.
    pub fn pass_round<T: Scalar>(&self, block: &mut Array2<T>, shape: (usize, usize)) {
        let (rank, size) = (self.rank(), self.size());
        if size == 1 {
            return;
        }
        let next = self.world.process_at_rank(((rank + 1) % size) as i32);
        let previous = self.world.process_at_rank(((rank + size - 1) % size) as i32);
        let own = crate::attention::shards::entries(block);
        let mut incoming = Array2::zeros(shape);
        let theirs = crate::attention::shards::entries(&mut incoming);
        // The same number of messages each way, empty ones at the end of the shorter side.
        let messages = own.len().max(theirs.len()).div_ceil(MESSAGE);
        for i in 0..messages {
            let part = |length: usize| (i * MESSAGE).min(length)..((i + 1) * MESSAGE).min(length);
            let (mine, received) = (&own[part(own.len())], part(theirs.len()));
            mpi::point_to_point::send_receive_into(mine, &next, &mut theirs[received], &previous);
            self.count(|t| {
                t.sent += size_of_val(mine) as u64;
                t.messages += 1;
            });
        }
        *block = incoming;
    }

    /// The rows of all ranks, one below the other, on rank 0.
    pub fn gather_rows<T: Scalar>(&self, own: &Array2<T>) -> Option<Array2<T>> {
        let counts = self.gather_counts(own.nrows());
        let mut own = own.as_standard_layout().into_owned();
        if !self.is_first() {
            let root = self.world.process_at_rank(0);
            for part in crate::attention::shards::entries(&mut own).chunks(MESSAGE) {
                root.send(part);
                self.count(|t| {
                    t.sent += size_of_val(part) as u64;
                    t.messages += 1;
                });
            }
            return None;
        }
        let mut all = Array2::zeros((counts.iter().sum(), own.ncols()));
        let mut rest = crate::attention::shards::entries(&mut all);
        for (rank, rows) in counts.into_iter().enumerate() {
            let (here, after) = rest.split_at_mut(rows * own.ncols());
            rest = after;
            if rank == 0 {
                here.copy_from_slice(crate::attention::shards::entries(&mut own));
                continue;
            }
            for part in here.chunks_mut(MESSAGE) {
                self.world.process_at_rank(rank as i32).receive_into(part);
            }
        }
        Some(all)
    }

    /// Sends bytes to a rank.
    pub fn send_bytes(&self, to: usize, bytes: &[u8]) {
        self.world.process_at_rank(to as i32).send(bytes);
        self.count(|t| {
            t.sent += bytes.len() as u64;
            t.messages += 1;
        });
    }

    /// A message that has arrived, with its sender, if there is one.
    pub fn arrived(&self) -> Option<(usize, Vec<u8>)> {
        let (message, status) = self.world.any_process().immediate_matched_probe()?;
        let mut bytes = vec![0u8; status.count(u8::equivalent_datatype()) as usize];
        message.matched_receive_into(&mut bytes[..]);
        Some((status.source_rank() as usize, bytes))
    }

    /// The next message, however long it takes. Looks now and then, where MPI's own wait would keep
    /// a core busy.
    pub fn wait_for_message(&self) -> (usize, Vec<u8>) {
        loop {
            match self.arrived() {
                Some(message) => return message,
                None => std::thread::sleep(PATIENCE),
            }
        }
    }
}

/// Pause between looks for a message.
pub const PATIENCE: Duration = Duration::from_millis(2);

impl<T: Scalar> RowShards<T> for Ranks {
    fn count(&self) -> usize {
        self.size()
    }

    fn sum(&self, values: &mut [T]) -> Result<()> {
        self.reduce_with(values, SystemOperation::sum());
        self.count(|t| t.reduced += size_of_val(values) as u64);
        Ok(())
    }

    fn sum_before(&self, values: &mut [T]) -> Result<()> {
        self.scan(&self.world, values);
        Ok(())
    }

    fn sum_after(&self, values: &mut [T]) -> Result<()> {
        self.scan(&self.reversed, values);
        Ok(())
    }

    fn sum_wide(&self, values: &mut [f64]) -> Result<()> {
        self.control(values, SystemOperation::sum());
        Ok(())
    }

    fn largest(&self, value: f64) -> Result<f64> {
        let mut value = [value];
        self.control(&mut value, SystemOperation::max());
        Ok(value[0])
    }

    fn agree(&self, failed: bool) -> Result<()> {
        let size = self.size();
        // The largest is that of the first rank that failed.
        let mut first = [if failed { (size - self.rank()) as i32 } else { 0 }];
        self.control(&mut first, SystemOperation::max());
        match first[0] {
            0 => Ok(()),
            first => Err(Error::OtherRank { op: "gradient", rank: size - first as usize }),
        }
    }
}
