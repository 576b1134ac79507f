#!/usr/bin/env bash
# A Slurm job: one rank a node, all its cores as threads. Submit with `sbatch examples/slurm.sh` from the repository.
#SBATCH --job-name=peft-limits
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail

# Build once, on the login node, against the cluster's MPI library:
#   module load openmpi llvm      # or whatever provides mpicc and libclang
#   cargo build --release --features mpi --bins --example long_sequence

export RAYON_NUM_THREADS=$SLURM_CPUS_PER_TASK

# A gradient over ten million tokens; nothing is gathered.
srun target/release/examples/long_sequence --tokens 10000000 --repeats 3

# An experiment, its points handed out to the ranks as they become free. If a node dies, Slurm ends the step: submit
# the job again, and --resume measures only what is missing. The output folder must be one that all nodes see.
srun target/release/solvable_model --profile full --out results/solvable_model --resume
