//! The hardness side as runnable code: nearest neighbours in Hamming distance, decided by attention
//! or by a LoRA gradient.
//!
//! The lower bounds of \[AS23\], \[AS24\] and \[CL-LoRA\] (section 5) turn a fast approximation of
//! attention, or of its gradient, into a fast decision of gap nearest neighbour: is some pair of
//! two sets within distance t, or is every pair beyond a larger one? [`instance`] draws such
//! instances with a promise that holds exactly, [`embedding`] makes the head with entries bounded
//! by Gamma, [`decision`] reads the answer off an output or off dB_Q alone, [`row_sums`] computes
//! both exactly from the distances.

pub mod accuracy;
pub mod decision;
pub mod embedding;
pub mod instance;
pub mod row_sums;
