//! A head: its gradients, factorizations, bounds, hardness, and the decompositions below them.

mod attention_fixtures;
mod bounds;
mod chained;
mod counted_operations;
mod decompositions;
mod dumped_heads;
mod factorizations;
mod gradient_finite_differences;
mod gradient_properties;
mod hardness;
mod naive;
mod phase_diagram;
