//! Running a long computation on rayon's own threads.

use rayon::{Scope, Yield};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Whether threads without work stay awake; see [`keep_awake`].
static KEEP_AWAKE: AtomicBool = AtomicBool::new(false);

/// From now on threads that wait for work during a step stay awake, as those of OpenMP's runtimes
/// do for a while: waking one takes 50 to 75 µs, and at the end of each of a step's some 600 loops
/// some thread waits.
///
/// It burns what other work on the machine could use, so it is for a program that owns rayon's
/// threads, never for a library.
pub fn keep_awake() {
    KEEP_AWAKE.store(true, Relaxed);
}

/// Runs `task` on one of rayon's threads and waits for it. On a rayon thread already, `task` is
/// simply called. The result is the same. A loop begun on any other thread would put that thread to
/// sleep and wake it afterwards.
pub fn on_workers<R: Send>(task: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return task();
    }
    let over = AtomicBool::new(false);
    rayon::scope(|scope| {
        let _over = SetOnDrop(&over);
        if KEEP_AWAKE.load(Relaxed) {
            for _ in 1..rayon::current_num_threads() {
                scope.spawn(|scope| stay_awake(scope, &over));
            }
        }
        task()
    })
}

/// Work for a thread that has none: looks for other work once, lets other programs run if there is
/// none, and puts itself back. It never waits, so that a thread which meets it while it waits for
/// something else is not held up.
fn stay_awake<'a>(scope: &Scope<'a>, over: &'a AtomicBool) {
    if rayon::yield_now() != Some(Yield::Executed) {
        std::thread::yield_now();
    }
    if !over.load(Relaxed) {
        scope.spawn(|scope| stay_awake(scope, over));
    }
}

/// Sets what it holds when dropped, also by a panic of the task: the scope would otherwise wait
/// forever.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::{keep_awake, on_workers};
    use rayon::prelude::*;

    #[test]
    fn the_task_runs_on_a_worker_and_returns() {
        assert!(rayon::current_thread_index().is_none());
        let index = on_workers(|| on_workers(rayon::current_thread_index));
        assert!(index.is_some());
    }

    #[test]
    fn a_panic_of_the_task_is_passed_on() {
        let result = std::panic::catch_unwind(|| on_workers(|| panic!("as a task may")));
        assert!(result.is_err());
        assert_eq!(on_workers(|| 7), 7);
    }

    #[test]
    fn tasks_of_several_threads_with_loops_of_their_own_all_end() {
        keep_awake();
        let total = |n: u64| {
            on_workers(|| (0..200).map(|i| (0..n + i).into_par_iter().sum::<u64>()).sum::<u64>())
        };
        let want = |n: u64| (0..200).map(|i| (n + i) * (n + i - 1) / 2).sum::<u64>();
        std::thread::scope(|threads| {
            let running: Vec<_> =
                (1..9).map(|n| (n, threads.spawn(move || total(1000 * n)))).collect();
            for (n, thread) in running {
                assert_eq!(thread.join().ok(), Some(want(1000 * n)));
            }
        });
    }
}
